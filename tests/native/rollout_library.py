"""The C ABI of latent_rollout's CPU kernels through ctypes, on arrays or tensors. No torch: sanitized children import this."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from tests.simt.rollout_abi import _FUNCTIONS, _field

ISAS = {"portable": 0, "avx2": 1, "avx512": 2}


class CpuLibrary:
    """The loaded kernels on one instruction set; a refusal becomes a RuntimeError.

    `parallel_for` is a C function or a ctypes callback of the type jk_parallel_for, and may be replaced between calls, as may `isa`.
    """

    def __init__(self, path: str | Path, isa: int, parallel_for: Callable | None = None) -> None:
        self.library, self.isa, self.parallel_for = ctypes.CDLL(str(path)), isa, parallel_for
        for name, params in _FUNCTIONS.items():
            function = getattr(self.library, f"jk_latent_rollout_cpu_{name}")
            function.argtypes, function.restype = [ctypes.POINTER(params), ctypes.c_int, ctypes.c_void_p], ctypes.c_char_p
        self.library.jk_latent_rollout_cpu_gru_tiles.argtypes = [ctypes.c_int64]
        self.library.jk_latent_rollout_cpu_gru_tiles.restype = ctypes.c_int64

    def tiles(self, rows: int) -> int:
        return self.library.jk_latent_rollout_cpu_gru_tiles(rows)

    def call(self, name: str, **values) -> None:
        """Runs one function; a value is a number, a Table, or something with an address (array or tensor)."""
        params = _FUNCTIONS[name]()
        for field, value in values.items():
            setattr(params, field, _field(value))
        function = getattr(self.library, f"jk_latent_rollout_cpu_{name}")
        error = function(ctypes.byref(params), self.isa, ctypes.cast(self.parallel_for, ctypes.c_void_p))
        if error is not None:
            raise RuntimeError(error.decode())
