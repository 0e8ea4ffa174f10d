"""Triton backend of a GRU's rollout: a step takes one launch around two products of torch."""

from __future__ import annotations

from typing import Any

import torch

from ...products import add_matmul, matmul
from ..triton_launch import options, padded, triton_backend
from . import rollout
from .inputs import Inputs
from .rollout import GateGradients, with_action_products

WIDEST = 4096
ROWS = 4  # of a program


class Triton:
    """See `rollout.Kernels`."""

    def recurrence(
        self,
        inputs: Inputs,
        start: torch.Tensor,
        actions: torch.Tensor,
        keep_all: bool,
        save: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from .triton_kernels import gru_fwd_kernel

        weight_input, weight_state, *small = inputs.weights
        bias_input, bias_state, norm_weight, norm_bias = (w.float().contiguous() for w in small)
        (horizon, rows, _), width, operand = actions.shape, start.shape[1], weight_state.dtype
        states = start.new_empty((horizon if keep_all else 1, rows, width))
        gates = start.new_empty((horizon, rows, 4 * width) if save else (0,))
        grid, fixed = _sizes(rows, width)
        state = start
        for k in range(horizon if rows else 0):
            from_action, from_state = (
                matmul(actions[k], weight_input.mT, operand),
                matmul(state, weight_state.mT, operand),
            )
            after = (
                states[k]
                if keep_all
                else states[0]
                if k + 1 == horizon
                else torch.empty_like(states[0])
            )
            gru_fwd_kernel[grid](
                from_action,
                from_state,
                bias_input,
                bias_state,
                norm_weight,
                norm_bias,
                state,
                after,
                gates[k] if save else gates,
                rows,
                state.stride(0),
                inputs.epsilon,
                width,
                SAVE=save,
                **fixed,
            )
            state = after
        return states, gates

    def recurrence_backward(
        self,
        inputs: Inputs,
        start: torch.Tensor,
        actions: torch.Tensor,
        states: torch.Tensor,
        gates: torch.Tensor,
        grad_states: torch.Tensor,
    ) -> GateGradients:
        from .triton_kernels import gru_bwd_kernel

        weight_state, norm_weight = inputs.weight_state, inputs.norm_weight.float()
        (horizon, rows, _), width, operand = gates.shape, start.shape[1], weight_state.dtype
        grid, fixed = _sizes(rows, width)
        grad_gates, grad_norm = torch.empty_like(gates), start.new_zeros((grid[0], 2, width))
        carried = torch.zeros_like(states[0]) if inputs.keeps_all else grad_states.contiguous()
        for k in reversed(range(horizon if rows else 0)):
            grad = carried + grad_states[k] if inputs.keeps_all else carried
            before, carried = states[k - 1] if k else start, torch.empty_like(carried)
            gru_bwd_kernel[grid](
                gates[k],
                before,
                grad,
                norm_weight,
                grad_gates[k],
                carried,
                grad_norm,
                rows,
                before.stride(0),
                inputs.epsilon,
                width,
                **fixed,
            )
            carried = add_matmul(
                carried, grad_gates[k][:, : 2 * width], weight_state[: 2 * width], operand
            )
            carried = add_matmul(
                carried, grad_gates[k][:, 3 * width :], weight_state[2 * width :], operand
            )
        return with_action_products(
            grad_gates,
            carried,
            grad_norm[:, 0].sum(0),
            grad_norm[:, 1].sum(0),
            actions,
            inputs.weight_input,
        )


def _sizes(rows: int, width: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of programs, and their tile sizes and options."""
    return (-(-rows // ROWS),), {
        "BM": ROWS,
        "BN": padded(width),
        **options(4 if width <= 1024 else 8),
    }


BACKEND = triton_backend(rollout, Triton(), WIDEST)
