"""The specification of a Hamiltonian's rollout: the state itself is stepped, by forces that come
from automatic differentiation of the energy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ....backend import ANY_DEVICE, Backend
from ..kernel_backend import takes_all
from ..stepping import stepped
from .inputs import Inputs


def energy(cell: Any, state: torch.Tensor) -> torch.Tensor:
    """G of each row ``[rows]``, up to a constant, of a `Hamiltonian` or an `Inputs`."""
    first = F.gelu(F.linear(state, cell.weight_in, cell.bias_in))
    second = F.gelu(F.linear(first, cell.weight_hidden, cell.bias_hidden))
    return F.linear(second, cell.weight_energy)[:, 0]


def _total_energy(inputs: Inputs, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return energy(inputs, torch.cat((q, p), dim=-1)).sum()


def step(inputs: Inputs, state: torch.Tensor, k: int) -> torch.Tensor:
    """q' = q + dt dG/dp(q, p), then p' = p - dt dG/dq(q', p)."""
    q, p = state.chunk(2, dim=-1)
    q = q + inputs.time_step * torch.func.grad(_total_energy, argnums=2)(inputs, q, p)
    p = p - inputs.time_step * torch.func.grad(_total_energy, argnums=1)(inputs, q, p)
    return torch.cat((q, p), dim=-1)


def compose(inputs: Inputs) -> tuple[torch.Tensor]:
    return stepped(inputs, step)


BACKEND = Backend("reference", ANY_DEVICE, takes_all, compose=compose)
