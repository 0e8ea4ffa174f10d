"""The specification of a GRU's rollout: torch.nn.GRUCell and a LayerNorm, written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ....backend import ANY_DEVICE, Backend
from ..kernel_backend import takes_all
from ..stepping import stepped
from .inputs import Inputs


def step(inputs: Inputs, state: torch.Tensor, k: int) -> torch.Tensor:
    """LayerNorm(GRUCell(actions[k], z)) for states ``[rows, D]``."""
    action = inputs.actions[k]
    from_action = F.linear(action, inputs.weight_input, inputs.bias_input).chunk(3, dim=-1)
    from_state = F.linear(state, inputs.weight_state, inputs.bias_state).chunk(3, dim=-1)
    reset = torch.sigmoid(from_action[0] + from_state[0])
    update = torch.sigmoid(from_action[1] + from_state[1])
    candidate = torch.tanh(from_action[2] + reset * from_state[2])
    mixed = (1 - update) * candidate + update * state
    norm = inputs.norm_weight, inputs.norm_bias
    return F.layer_norm(mixed, (state.shape[-1],), *norm, inputs.epsilon)


def compose(inputs: Inputs) -> tuple[torch.Tensor]:
    return stepped(inputs, step)


BACKEND = Backend("reference", ANY_DEVICE, takes_all, compose=compose)
