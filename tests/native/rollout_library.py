"""The C ABI of latent_rollout's CPU kernels through ctypes, on arrays or tensors. No torch:
sanitized children import this."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from tests.simt.rollout_abi import Library

ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}


class CpuLibrary(Library):
    """The loaded kernels on one instruction set.

    `parallel_for` is a C function or a ctypes callback of the type jk_parallel_for, and may be
    replaced between calls, as may `isa`.
    """

    device = "cpu"
    more_types = (ctypes.c_int, ctypes.c_void_p)

    def __init__(self, path: str | Path, isa: int, parallel_for: Callable | None = None) -> None:
        super().__init__(path)
        self.isa, self.parallel_for = isa, parallel_for

    def more(self) -> tuple:
        return self.isa, ctypes.cast(self.parallel_for, ctypes.c_void_p)
