"""The CPU kernels of ema_update and adamw_ema under a sanitizer: `python list_sanitized.py LIBRARY
[overlap]`. NumPy and ctypes only.

Every piece of the parallel region runs in a thread of its own (list_parallel.cpp), so that two
pieces that touch one element are a data race. With `overlap` they do.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from tests.simt import ema_abi

SIZES = (1, 31, 0, 33, 1024, 2500, 7)


def arrays(seed: int, *kinds: type) -> list[list[np.ndarray]]:
    """For every size one array of each kind, exactly as long as the kernel may touch. bfloat16 is
    uint16."""
    rng = np.random.default_rng(seed)
    return [
        [
            rng.integers(0, 2**14, n).astype(k) if k is np.uint16 else rng.random(n).astype(k)
            for k in kinds
        ]
        for n in SIZES
    ]


def run(library: ctypes.CDLL, isa: int) -> bytes | None:
    parallel_for = ctypes.cast(library.uneven_threads, ema_abi.ABI.callbacks["jk_parallel_for"])
    for target in (np.float32, np.uint16, np.float16):
        for rounding in (ema_abi.NEAREST, ema_abi.KAHAN, ema_abi.STOCHASTIC):
            if rounding == ema_abi.STOCHASTIC and target is np.float16:
                continue
            lists = arrays(1, target, np.float16, np.uint16, target)
            entries = (ema_abi.EmaTensor * len(lists))(
                *(ema_abi.ema_tensor(*a, index=i) for i, a in enumerate(lists))
            )
            params = ema_abi.EmaParams(entries, len(lists), 0.9, None, rounding, 5, None)
            if error := library.jk_ema_update_cpu_fwd(ctypes.byref(params), isa, parallel_for):
                return error
    lists, teachers = (
        arrays(2, np.uint16, np.float32, np.float32, np.float32),
        arrays(3, np.float32, np.uint16),
    )
    hyper = np.array([[1e-2, 0.9, 0.999, 1e-8, 0.05, 0.0]])
    entries = (ema_abi.AdamwTensor * len(lists))(
        *(
            ema_abi.adamw_tensor(
                *a, ema_abi.ema_tensor(t[0], None, t[1], index=i), group=0, step=2.0
            )
            for i, (a, t) in enumerate(zip(lists, teachers, strict=True))
        )
    )
    params = ema_abi.AdamwParams(
        entries, len(lists), ema_abi.address(hyper), None, None, None, 0.9, None, 0, 0, None
    )
    return library.jk_adamw_ema_cpu_fwd(ctypes.byref(params), isa, parallel_for)


if __name__ == "__main__":
    kernels = ema_abi.open_library(sys.argv[1])
    for cuts in (1, 5):
        kernels.choose_pieces(
            ctypes.c_int64(cuts), ctypes.c_int64(64 if sys.argv[2:] == ["overlap"] else 0)
        )
        for chosen in (0, -1):
            problem = run(kernels, chosen)
            if problem is not None:
                sys.exit(f"kernel: {problem.decode()}")
