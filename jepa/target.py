"""The target encoder: a moving average of the context encoder, or the context encoder itself."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import jepa_kernels

M = TypeVar("M", bound=nn.Module)

STANDARDISE_EPS = 1e-5


def standardise(features: Tensor, levels: int) -> Tensor:
    """Every level of every token to mean 0 and variance 1: (x - mean) / sqrt(var + 1e-5) over its
    channels, no affine map.

    Args:
        features: [.., levels * E].
        levels: number of levels.

    Returns:
        float32 (float64 for float64 input) of the same shape.
    """
    wide = features if features.dtype == torch.float64 else features.to(torch.float32)
    by_level = wide.unflatten(-1, (levels, -1))
    return functional.layer_norm(by_level, by_level.shape[-1:], eps=STANDARDISE_EPS).flatten(-2)


def frozen_copy(encoder: M) -> M:
    """A copy with the same weights that never needs a gradient."""
    return copy.deepcopy(encoder).requires_grad_(False)


def update_ema(target: nn.Module, online: nn.Module, momentum: float | Tensor) -> None:
    """target <- momentum * target + (1 - momentum) * online for every parameter, in one pass and in
    the target's dtype.

    A momentum on the device is never read back.
    """
    targets, sources = (
        list(target.parameters()),
        [source.detach() for source in online.parameters()],
    )
    jepa_kernels.ema_update_(targets, sources, momentum)
