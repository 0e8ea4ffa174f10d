"""The specification: every tubelet of every clip, normalised, and those of the rows multiplied."""

from __future__ import annotations

import torch
from torch.nn import functional

from ...backend import ANY_DEVICE, Backend, Reason
from .inputs import Inputs
from .rows import token_rows


def unsupported(inputs: Inputs) -> list[Reason]:
    return []


def compose(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    (batch, channels), (frames, height, width) = inputs.clip.shape[:2], inputs.grid
    gain, shift = inputs.normalisation[:, :, None, None, None]
    clip = inputs.clip.to(inputs.accumulate_dtype) * gain + shift
    cut = clip.reshape(
        batch,
        channels,
        frames,
        inputs.tubelet[0],
        height,
        inputs.tubelet[1],
        width,
        inputs.tubelet[2],
    )
    # [B, T, H, W, C, pt, ph, pw]: pixels in the order of a Conv3d weight.
    patches = cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch * inputs.tokens, inputs.pixels)
    rows = token_rows(inputs)
    visible = patches.index_select(0, rows).to(inputs.dtype)
    embedded = functional.linear(visible, inputs.matrix(), inputs.bias)
    return embedded.view(*inputs.tokens_shape, inputs.width), rows


BACKEND = Backend("reference", ANY_DEVICE, unsupported, compose=compose)
