"""sliced_gaussianity's kernels through their C ABI: those of a CPU, and those of a GPU on the SIMT
executor. Sanitized children need only `Library` and NumPy arrays: torch is imported by `Ops` alone.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from tests.abi.header import read

ABI = read("sliced_gaussianity")
MOST_KNOTS = ABI.constants["JK_MOST_KNOTS"]


class Library:
    """The kernels of one kind of device; `more` are the arguments behind the parameters. A refusal
    becomes a RuntimeError."""

    def __init__(self, path: str | Path, device: str, more: tuple[Any, ...]) -> None:
        self.library, self.device, self.more = ABI.open(path), device, more

    def piece_rows(self, rows: int) -> int:
        return getattr(self.library, f"jk_sliced_gaussianity_{self.device}_piece_rows")(rows)

    def call(self, name: str, **values: Any) -> None:
        """Runs ``sums`` or ``slope``; a value is a number, or something with an address."""
        params = ABI.structs["jk_sliced_gaussianity_params"]()
        for field, value in values.items():
            setattr(params, field, value if isinstance(value, (int, float)) else _address(value))
        function = getattr(self.library, f"jk_sliced_gaussianity_{self.device}_{name}")
        error = function(ctypes.byref(params), *self.more)
        if error is not None:
            raise RuntimeError(error.decode())


def on_the_executor(path: str | Path) -> Library:
    return Library(path, "cuda", (None,))


def _address(value: Any) -> int:
    return value.data_ptr() if hasattr(value, "data_ptr") else value.ctypes.data


class Ops:
    """What `native_ops.OPS` offers, on a library; results lie between fences of NaN."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def sliced_gaussianity_sums(self, projections, count, spacing, isa):
        rows, columns = projections.shape
        piece_rows = self.library.piece_rows(rows)
        pieces = -(-rows // piece_rows)
        memory, sums = _fenced((pieces, 2, count, columns))
        self.library.call(
            "sums",
            rows=rows,
            columns=columns,
            knots=count,
            spacing=spacing,
            projections=projections,
            sums=sums,
            pieces=pieces,
            piece_rows=piece_rows,
        )
        _check_fences(memory, sums)
        return sums

    def sliced_gaussianity_slope_(self, projections, coefficients, spacing, isa):
        rows, columns = projections.shape
        memory, slope = _fenced((rows, columns))
        slope.copy_(projections)
        self.library.call(
            "slope",
            rows=rows,
            columns=columns,
            knots=coefficients.shape[1],
            spacing=spacing,
            projections=slope,
            coefficients=coefficients,
            slope=slope,
        )
        _check_fences(memory, slope)
        projections.copy_(slope)


_FENCE = 67


def _fenced(shape: tuple[int, ...]):
    import torch

    count = 1
    for size in shape:
        count *= size
    memory = torch.full((count + 2 * _FENCE,), torch.nan)
    return memory, memory[_FENCE : _FENCE + count].view(shape)


def _check_fences(memory, inside) -> None:
    assert memory[:_FENCE].isnan().all() and memory[-_FENCE:].isnan().all(), "written outside"
    assert not inside.isnan().any() or inside.numel() == 0, "an element was not written"


def run_on(monkeypatch, backend: str, library: Library) -> None:
    """A backend of C++ kernels runs on `library` in the place of the native torch ops, and takes
    CPU tensors."""
    from dataclasses import replace

    from jepa_kernels.backend import OPS
    from jepa_kernels.ops.sliced_gaussianity import native_ops
    from jepa_kernels.ops.sliced_gaussianity.inputs import NAME

    monkeypatch.setattr(native_ops, "OPS", Ops(library))
    backends = OPS[NAME].backends
    willing = replace(backends[backend], unsupported=lambda inputs: [])
    monkeypatch.setitem(backends, backend, willing)
