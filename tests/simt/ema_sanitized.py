"""A small run of both kernels for a sanitizer: `python ema_sanitized.py ema_update|adamw_ema
LIBRARY`. NumPy and ctypes only."""

from __future__ import annotations

import sys

import numpy as np

from tests.simt import ema_abi

SIZES = (1, 37, 4096 + 9)  # two chunks and an odd end


def ema(library) -> bytes | None:
    rng = np.random.default_rng(0)
    entries, kept = [], []
    for i, size in enumerate(SIZES):
        for target_type in (np.float32, np.uint16):
            arrays = [
                rng.integers(0, 2**14, size).astype(np.uint16)
                if target_type is np.uint16
                else rng.standard_normal(size).astype(np.float32)
            ]
            arrays += [
                rng.standard_normal(size).astype(np.float16),
                np.zeros(size, np.uint16),
                np.zeros(size, target_type),
            ]
            kept.append(arrays)
            entries.append(ema_abi.ema_tensor(*arrays, index=i))
    return ema_abi.ema_update(library, entries, 0.9, rounding=ema_abi.KAHAN) or ema_abi.ema_update(
        library, entries, 0.9, rounding=ema_abi.STOCHASTIC, seed=3
    )


def adamw(library) -> bytes | None:
    rng = np.random.default_rng(0)
    hyper = np.array([[1e-2, 0.9, 0.999, 1e-8, 0.05, 0.0]])
    entries, kept = [], []
    for i, size in enumerate(SIZES):
        arrays = [rng.standard_normal(size).astype(np.float32) for _ in range(3)] + [
            np.ones(size, np.float32)
        ]
        target, copy = np.zeros(size, np.float32), np.zeros(size, np.uint16)
        kept.append((arrays, target, copy))
        ema_entry = ema_abi.ema_tensor(target, None, copy, index=i)
        entries.append(
            ema_abi.adamw_tensor(
                *arrays,
                ema_entry,
                group=0,
                step=2.0,
                step_device=np.float32([2.0]) if i == 1 else None,
            )
        )
    return ema_abi.adamw_ema(library, entries, hyper, 0.9) or ema_abi.adamw_ema(
        library, entries, hyper, 0.9, hyper_on_device=True
    )


if __name__ == "__main__":
    run = {"ema_update": ema, "adamw_ema": adamw}[sys.argv[1]]
    error = run(ema_abi.open_library(sys.argv[2]))
    sys.exit(0 if error is None else f"kernel: {error.decode()}")
