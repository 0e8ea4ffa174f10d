"""A small run of sliced_gaussianity's kernels for a sanitizer: `python gaussianity_sanitized.py
LIBRARY cuda`, or `... LIBRARY cpu ISA [overlap]` with the functions of list_parallel.cpp. NumPy and
ctypes only; every array is exactly as long as a kernel may touch."""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from tests.simt.gaussianity_abi import ABI, Library, on_the_executor

SHAPES = ((1, 1, 1), (5, 33, 2), (70, 31, 16), (530, 17, 3), (6, 80, 64))


def run(library: Library) -> None:
    rng = np.random.default_rng(0)
    for rows, columns, knots in SHAPES:
        projections = rng.standard_normal((rows, columns)).astype(np.float32)
        projections[0, 0] = 1e7  # beyond the fast reduction
        piece_rows = library.piece_rows(rows)
        pieces = -(-rows // piece_rows)
        sums = np.empty((pieces, 2, knots, columns), np.float32)
        coefficients = rng.standard_normal((2, knots, columns)).astype(np.float32)
        shared = {"rows": rows, "columns": columns, "knots": knots, "spacing": 0.1875}
        shared["projections"] = projections
        library.call("sums", **shared, sums=sums, pieces=pieces, piece_rows=piece_rows)
        library.call("slope", **shared, coefficients=coefficients, slope=projections)


if __name__ == "__main__":
    path, device, *rest = sys.argv[1:]
    if device == "cuda":
        run(on_the_executor(path))
    else:
        kernels = ABI.open(path)
        parallel_for = ctypes.cast(kernels.uneven_threads, ABI.callbacks["jk_parallel_for"])
        for cuts in (1, 5):
            kernels.choose_pieces(ctypes.c_int64(cuts), ctypes.c_int64(len(rest) > 1))
            run(Library(path, "cpu", (int(rest[0]), parallel_for)))
