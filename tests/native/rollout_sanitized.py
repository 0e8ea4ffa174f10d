"""Saved calls of latent_rollout's CPU kernels under a sanitizer: `python rollout_sanitized.py LIBRARY CALLS.npz ISA,... [overlap]`.

NumPy and ctypes only. Tiles run in threads that nothing orders after one another; with `overlap` each runs its neighbour's as well: a race.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from tests.native.rollout_library import ISAS, CpuLibrary
from tests.simt.rollout_abi import Table


def _arguments(entries: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """The values of a call, and its arrays by the names under which tests.simt.rollout_saved keeps them."""
    arrays = {key.removesuffix("/before"): entry.copy() for key, entry in entries.items() if key.endswith("/before")}
    values: dict = {}
    for key, entry in entries.items():
        field, kind = key.split("/")[:2]
        if kind == "number":
            values[field] = entry.item()
        elif kind == "array":
            values[field] = arrays[f"{field}/array"]
        elif kind == "table":
            values[field] = Table(arrays[f"{field}/data"], arrays.get(f"{field}/index"), *(int(v) for v in entry))
    return values, arrays


def replay(library: CpuLibrary, calls: str, compare: bool) -> int:
    """Results must be those of the plain library up to rounding: another instruction set fuses other operations."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    with np.load(calls) as saved:
        for key in saved.files:
            number, name, rest = key.split("/", 2)
            groups.setdefault(f"{number}/{name}", {})[rest] = saved[key]
    for label, entries in groups.items():
        values, arrays = _arguments(entries)
        library.call(label.split("/")[1], **values)
        for key, actual in arrays.items() if compare else ():
            np.testing.assert_allclose(actual, entries[f"{key}/after"], rtol=1e-4, atol=1e-4, err_msg=f"{label} {key}")
    return len(groups)


if __name__ == "__main__":
    path, saved_calls, isas, *rest = sys.argv[1:]
    kernels = CpuLibrary(path, 0)
    kernels.parallel_for = kernels.library.uneven_threads
    for isa in isas.split(","):
        kernels.isa = ISAS[isa]
        for cuts in (1, 3):
            kernels.library.choose_pieces(ctypes.c_int64(cuts), ctypes.c_int64(len(rest)))
            print(f"{isa}: {replay(kernels, saved_calls, compare=not rest)} calls agree")
