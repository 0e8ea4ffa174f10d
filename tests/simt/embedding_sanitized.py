"""A small run of visible_patch_embed's kernels for a sanitizer: `python embedding_sanitized.py
LIBRARY cuda`, or `... LIBRARY cpu ISA [overlap]` with the functions of list_parallel.cpp. NumPy and
ctypes only; every array is exactly as long as a kernel may touch."""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from tests.simt.embedding_abi import ABI, DTYPES, Library, layout, on_the_executor

# Clip shapes, tubelets, rows and channels.
CASES = (
    ((1, 1, 1, 1, 1), (1, 1, 1), 1, 1),
    ((2, 3, 4, 32, 16), (2, 16, 16), 3, 5),
    ((1, 2, 3, 6, 14), (1, 3, 7), 70, 33),
)


def run(library: Library) -> None:
    rng = np.random.default_rng(0)
    for shape, tubelet, count, width in CASES:
        numbers = shape[1] * int(np.prod(tubelet))
        tokens = int(np.prod(shape)) // numbers
        rows = rng.integers(0, tokens, count)
        order = np.argsort(rows, kind="stable")
        starts = np.searchsorted(rows[order], np.arange(tokens + 1))
        gain, shift = rng.standard_normal((2, shape[1])).astype(np.float32)
        for dtype in (np.uint8, np.float32, np.float16):
            clip = rng.integers(0, 99, shape).astype(dtype)
            strides = [s // clip.itemsize for s in clip.strides]
            shared = {
                **layout(shape, strides, tubelet),
                "clip": clip,
                "clip_dtype": DTYPES[np.dtype(dtype).name],
                "gain": gain,
                "shift": shift,
                "count": count,
            }
            if dtype != np.uint8:
                of_pixels = rng.standard_normal((count, numbers)).astype(np.float32)
                places = {"order": order, "starts": starts, "clip_gradient": clip}
                library.call("scatter", **shared, of_pixels=of_pixels, **places)
            shared["rows"] = rows
            if library.device == "cpu":
                for name, kind in (("float32", np.float32), ("bfloat16", np.uint16)):
                    pixels = np.empty((count, numbers), kind)
                    library.call("gather", **shared, pixels=pixels, pixels_dtype=DTYPES[name])
                continue
            shared["width"] = width
            piece_rows = library.piece_rows(count, width, numbers)
            pieces = -(-count // piece_rows)
            for kind in (np.float32, np.float16):
                shared["dtype"] = DTYPES[np.dtype(kind).name]
                weight = rng.standard_normal((width, numbers)).astype(kind)
                grad_out = rng.standard_normal((count, width)).astype(kind)
                out, bias = np.empty((count, width), kind), weight[:, 0].copy()
                library.call("embed", **shared, weight=weight, bias=bias, out=out)
                partial = np.empty((pieces, width, numbers), np.float32)
                places = {"pieces": pieces, "piece_rows": piece_rows, "weight_gradient": partial}
                library.call("weight_gradient", **shared, grad_out=grad_out, **places)


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
