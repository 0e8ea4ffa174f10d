"""Triton backend of sliced_gaussianity, products through torch. The kernels are imported on first
use.

Nothing here reads a tensor's values, so a call never waits for the device and can be captured in a
CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import triton_runtime
from ...backend import Reason
from .blocks import block_backend
from .inputs import Inputs, kernel_reasons

# Rows and directions of a program, with eight warps: 16 projections of a thread, five numbers each.
ROWS, COLUMNS, WARPS = 128, 32, 8
# The angle up to which float32 reduces it, with products that are fused or not.
LIMIT = 20000.0


def unsupported(inputs: Inputs) -> list[Reason]:
    return triton_runtime.unavailable_reasons(inputs.device_type) + kernel_reasons(inputs)


class Triton:
    """See `blocks.Kernels`."""

    def sums(self, projections: torch.Tensor, count: int, spacing: float) -> torch.Tensor:
        from .triton_kernels import sums_kernel

        rows, columns = projections.shape
        tiles = -(-rows // ROWS)
        sums = projections.new_empty((tiles, 2, count, columns))
        if rows:
            sums_kernel[_grid(rows, columns)](
                projections, sums, rows, columns, count, spacing, LIMIT, **options()
            )
        return sums[0] if tiles == 1 else sums.sum(0)

    def slope_(self, projections: torch.Tensor, coefficients: torch.Tensor, spacing: float) -> None:
        from .triton_kernels import slope_kernel

        (rows, columns), count = projections.shape, coefficients.shape[1]
        if rows:
            slope_kernel[_grid(rows, columns)](
                projections, coefficients, rows, columns, count, spacing, LIMIT, **options()
            )


def options() -> dict[str, Any]:
    """Tile sizes and launch options; the compile gate builds the same ones."""
    from ...triton_support import FP_FUSION

    return {"BM": ROWS, "BN": COLUMNS, "num_warps": WARPS, "num_stages": 2, **FP_FUSION}


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // ROWS), -(-columns // COLUMNS)


BACKEND = block_backend(
    "triton", triton_runtime.DEVICES, unsupported, Triton(), triton_runtime.device_of
)
