"""The specification of a residual MLP's rollout: the state itself is stepped."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ....backend import ANY_DEVICE, Backend
from ..kernel_backend import takes_all
from ..stepping import stepped
from .inputs import Inputs


def step(inputs: Inputs, state: torch.Tensor, k: int) -> torch.Tensor:
    """x + W2 gelu(W1 x + b1) + b2 for states ``[rows, D]``."""
    edges = inputs.in_channels
    seen = [state[:, a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    hidden = F.gelu(F.linear(torch.cat(seen, dim=-1), inputs.weight_in, inputs.bias_in))
    return state + F.linear(hidden, inputs.weight_out, inputs.bias_out)


def compose(inputs: Inputs) -> tuple[torch.Tensor]:
    return stepped(inputs, step)


BACKEND = Backend("reference", ANY_DEVICE, takes_all, compose=compose)
