"""The C ABI of latent_rollout's CPU kernels through ctypes, on arrays or tensors. No torch:
sanitized children import this."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from tests.native.build import ISAS as ISAS
from tests.simt.rollout_abi import ABI, Library


class CpuLibrary(Library):
    """The loaded kernels on one instruction set.

    `parallel_for` is a C function or a ctypes callback of the type jk_parallel_for, and may be
    replaced between calls, as may `isa`.
    """

    device = "cpu"

    def __init__(self, path: str | Path, isa: int, parallel_for: Callable | None = None) -> None:
        super().__init__(path)
        self.isa, self.parallel_for = isa, parallel_for

    def more(self) -> tuple:
        return self.isa, ctypes.cast(self.parallel_for, ABI.callbacks["jk_parallel_for"])
