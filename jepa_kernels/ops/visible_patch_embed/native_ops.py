"""The C++ kernels of csrc/visible_patch_embed that CPU and CUDA tensors share."""

from __future__ import annotations

from typing import Any

import torch

from ... import native
from .inputs import Inputs

OPS: Any = native.ops


def clip_gradient(
    inputs: Inputs, of_pixels: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """See `products.Products`."""
    clip = torch.empty_like(inputs.clip, memory_format=torch.contiguous_format)
    arguments = (of_pixels, order, starts, inputs.normalisation, *inputs.tubelet, native.isa())
    OPS.visible_patch_embed_scatter_(clip, *arguments)
    return clip
