"""Triton backend of visible_patch_embed: products whose pixels are gathered as they are multiplied.
The kernels are imported on first use.

Nothing here reads a tensor's values, so a call never waits for the device and can be captured in a
CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import triton_runtime
from ...backend import Reason
from .inputs import Inputs, gpu_reasons
from .products import product_backend

# Numbers of a token that a program of the scatter has.
SCATTERED = 512
# Rows of a piece of the weight gradient, at least; and programs that keep a GPU busy.
FEWEST_ROWS, PROGRAMS = 256, 512


def unsupported(inputs: Inputs) -> list[Reason]:
    return triton_runtime.unavailable_reasons(inputs.device_type) + gpu_reasons(inputs)


class Triton:
    """See `products.Products`."""

    def embed(self, inputs: Inputs, rows: torch.Tensor) -> torch.Tensor:
        from .triton_kernels import embed_kernel

        out = inputs.weight.new_empty((inputs.count, inputs.width))
        if inputs.count == 0:
            return out
        tile = product_options("embed", inputs.dtype)
        bias = inputs.weight if inputs.bias is None else inputs.bias.contiguous()
        embed_kernel[-(-inputs.count // tile["BM"]), -(-inputs.width // tile["BN"])](
            inputs.clip,
            rows,
            inputs.normalisation,
            inputs.weight,
            bias,
            out,
            inputs.count,
            inputs.width,
            *_layout(inputs, inputs.clip),
            HAS_BIAS=inputs.bias is not None,
            **_sizes(inputs),
            **tile,
        )
        return out

    def weight_gradient(
        self, inputs: Inputs, rows: torch.Tensor, grad_out: torch.Tensor
    ) -> torch.Tensor:
        from .triton_kernels import weight_gradient_kernel

        tile = product_options("weight_gradient", inputs.dtype)
        grid = -(-inputs.width // tile["BM"]), -(-inputs.pixels // tile["BN"])
        piece_rows = rows_of_piece(inputs.count, grid[0] * grid[1], tile["BK"])
        pieces = max(1, -(-inputs.count // piece_rows))
        partial = rows.new_empty((pieces, inputs.width, inputs.pixels), dtype=torch.float32)
        weight_gradient_kernel[*grid, pieces](
            inputs.clip,
            rows,
            inputs.normalisation,
            grad_out,
            partial,
            inputs.count,
            piece_rows,
            inputs.width,
            *_layout(inputs, inputs.clip),
            **_sizes(inputs),
            **tile,
        )
        return partial[0] if pieces == 1 else partial.sum(0)

    def clip_gradient(
        self, inputs: Inputs, of_pixels: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        from .triton_kernels import scatter_kernel

        gradient = torch.empty_like(inputs.clip, memory_format=torch.contiguous_format)
        if gradient.numel():
            grid = inputs.batch * inputs.tokens, -(-inputs.pixels // SCATTERED)
            scatter_kernel[grid](
                of_pixels,
                order,
                starts,
                inputs.normalisation,
                gradient,
                *_layout(inputs, gradient),
                **_sizes(inputs),
                **scatter_options(),
            )
        return gradient


def rows_of_piece(count: int, tiles: int, block: int) -> int:
    """Rows that one program of the weight gradient passes over, of sizes alone, so that results
    repeat: few enough for PROGRAMS programs, a multiple of the block."""
    pieces = max(1, -(-PROGRAMS // tiles))
    rows = max(FEWEST_ROWS, -(-count // pieces))
    return -(-rows // block) * block


def product_options(kernel: str, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes and launch options; the compile gate builds the same ones."""
    from ...triton_support import FP_FUSION

    sizes, stages = {"BM": 64, "BN": 64, "BK": 32}, 2
    if dtype == torch.float32:
        sizes["BK"], stages = 16, 2 if kernel == "embed" else 1
    return {**sizes, "num_warps": 8, "num_stages": stages, **FP_FUSION}


def scatter_options() -> dict[str, Any]:
    from ...triton_support import FP_FUSION

    return {"BN": SCATTERED, "num_warps": 4, "num_stages": 1, **FP_FUSION}


def _layout(inputs: Inputs, clip: torch.Tensor) -> tuple[int, ...]:
    return (*inputs.grid, *clip.stride())


def _sizes(inputs: Inputs) -> dict[str, int]:
    depth, high, wide = inputs.tubelet
    return {"CHANNELS": inputs.clip.shape[1], "DEPTH": depth, "HIGH": high, "WIDE": wide}


BACKEND = product_backend(
    "triton", triton_runtime.DEVICES, unsupported, Triton(), triton_runtime.device_of
)
