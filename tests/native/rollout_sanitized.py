"""Saved calls of latent_rollout's CPU kernels under a sanitizer: `python rollout_sanitized.py
LIBRARY CALLS.npz ISA,... [overlap]`.

NumPy and ctypes only. Tiles run in threads that nothing orders after one another; with `overlap`
each runs its neighbour's as well: a race.
"""

from __future__ import annotations

import ctypes
import sys

from tests.native.rollout_library import ISAS, CpuLibrary
from tests.simt.rollout_saved import saved_calls


def replay(library: CpuLibrary, calls: str, compare: bool) -> int:
    count = 0
    for saved in saved_calls(calls):
        library.call(saved.name, **saved.values)
        if compare:
            saved.check()
        count += 1
    return count


if __name__ == "__main__":
    path, calls, isas, *rest = sys.argv[1:]
    kernels = CpuLibrary(path, 0)
    kernels.parallel_for = kernels.library.uneven_threads
    for isa in isas.split(","):
        kernels.isa = ISAS[isa]
        for cuts in (1, 3):
            kernels.library.choose_pieces(ctypes.c_int64(cuts), ctypes.c_int64(len(rest)))
            print(f"{isa}: {replay(kernels, calls, compare=not rest)} calls agree")
