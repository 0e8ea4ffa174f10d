"""What every launch of a Triton kernel of masked_attention is told of its tensors. Host code, does
not import triton."""

from __future__ import annotations

from typing import Any

import torch

from .triton_table import Tile


def launch_options(shape: Tile) -> dict[str, Any]:
    """What Triton is told besides the arguments."""
    from ...triton_support import FP_FUSION

    return {
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        "maxnreg": shape.registers,
        **FP_FUSION,
    }


def panel_strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of (batch, row, head); a packed tensor is one batch entry."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


def alignment(*panels: torch.Tensor) -> int:
    """8 where every row of every panel starts on a multiple of 8 elements from its data pointer,
    else 1."""
    return 8 if all(stride % 8 == 0 for x in panels for stride in panel_strides(x)) else 1


def id_strides(ids: torch.Tensor | None) -> tuple[int, int]:
    """Strides of (batch, row) of token ids or times [N], [B, N] or packed [tokens]."""
    assert ids is not None  # given with a table
    return (0, ids.stride(0)) if ids.dim() == 1 else (ids.stride(0), ids.stride(1))
