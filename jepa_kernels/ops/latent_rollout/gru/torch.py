"""A GRU's rollout in eager PyTorch.

The baseline that kernels must beat, and what runs where no kernel does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...products import matmul
from ..kernel_backend import eager_backend
from . import rollout
from .inputs import Inputs


class Eager:
    """See `rollout.Kernels`."""

    def recurrence(
        self,
        inputs: Inputs,
        start: torch.Tensor,
        actions: torch.Tensor,
        keep_all: bool,
        save: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight_input, weight_state, bias_input, bias_state, norm_weight, norm_bias = inputs.weights
        width, operand = start.shape[1], weight_state.dtype
        state, states, gates = start, [], []
        for action in actions:
            from_action = (matmul(action, weight_input.mT, operand) + bias_input).split(
                width, dim=-1
            )
            from_state = (matmul(state, weight_state.mT, operand) + bias_state).split(width, dim=-1)
            reset = torch.sigmoid(from_action[0] + from_state[0])
            update = torch.sigmoid(from_action[1] + from_state[1])
            candidate = torch.tanh(torch.addcmul(from_action[2], reset, from_state[2]))
            mixed = torch.lerp(candidate, state, update)
            state = F.layer_norm(
                mixed,
                (width,),
                norm_weight.to(mixed.dtype),
                norm_bias.to(mixed.dtype),
                inputs.epsilon,
            )
            if keep_all:
                states.append(state)
            if save:
                gates.append(torch.cat((reset, update, candidate, from_state[2]), dim=-1))
        return torch.stack(states if keep_all else [state]), torch.stack(
            gates
        ) if save else start.new_empty(0)

    def recurrence_backward(
        self,
        inputs: Inputs,
        start: torch.Tensor,
        actions: torch.Tensor,
        states: torch.Tensor,
        gates: torch.Tensor,
        grad_states: torch.Tensor,
    ) -> rollout.GateGradients:
        weight_state, norm_weight = inputs.weight_state, inputs.norm_weight
        width, operand = start.shape[1], weight_state.dtype
        grad_gates = torch.empty_like(gates)
        grad_norm_weight, grad_norm_bias = start.new_zeros(width), start.new_zeros(width)
        horizon = gates.shape[0]
        carried = torch.zeros_like(start) if inputs.keeps_all else grad_states
        for k in reversed(range(horizon)):
            grad = carried + grad_states[k] if inputs.keeps_all else carried
            before = states[k - 1] if k else start
            reset, update, candidate, from_state = gates[k].split(width, dim=-1)
            mixed = torch.lerp(candidate, before, update)
            variance, mean = torch.var_mean(mixed, dim=-1, correction=0, keepdim=True)
            inverse = torch.rsqrt(variance + inputs.epsilon)
            normal = (mixed - mean) * inverse
            grad_norm_weight += (grad * normal).sum(0)
            grad_norm_bias += grad.sum(0)
            scaled = grad * norm_weight
            grad_mixed = inverse * (
                scaled
                - scaled.mean(-1, keepdim=True)
                - normal * (scaled * normal).mean(-1, keepdim=True)
            )
            into_reset, into_update, into_candidate, into_state = grad_gates[k].split(width, dim=-1)
            into_candidate.copy_(grad_mixed * (1 - update) * (1 - candidate * candidate))
            into_update.copy_(grad_mixed * (before - candidate) * update * (1 - update))
            into_reset.copy_(into_candidate * from_state * reset * (1 - reset))
            into_state.copy_(into_candidate * reset)
            carried = grad_mixed * update
            carried = carried + matmul(
                grad_gates[k][:, : 2 * width], weight_state[: 2 * width], operand
            )
            carried = carried + matmul(into_state, weight_state[2 * width :], operand)
        return rollout.with_action_products(
            grad_gates, carried, grad_norm_weight, grad_norm_bias, actions, inputs.weight_input
        )


BACKEND = eager_backend(rollout, Eager())
