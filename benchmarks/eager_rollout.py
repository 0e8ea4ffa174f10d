"""Rollouts as training and planning code writes them today: the state itself is stepped, in eager
PyTorch, with autograd's gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from jepa_kernels import GRU, Hamiltonian, ResidualMLP

Step = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def mlp_step(cell: ResidualMLP) -> Step:
    def step(state: torch.Tensor, action: torch.Tensor | None) -> torch.Tensor:
        return state + F.linear(
            F.gelu(F.linear(state, cell.weight_in, cell.bias_in)), cell.weight_out, cell.bias_out
        )

    return step


def energy(cell: Hamiltonian, state: torch.Tensor) -> torch.Tensor:
    first = F.gelu(F.linear(state, cell.weight_in, cell.bias_in))
    return F.linear(
        F.gelu(F.linear(first, cell.weight_hidden, cell.bias_hidden)), cell.weight_energy
    )


def hamiltonian_step(cell: Hamiltonian, differentiable: bool) -> Step:
    """Forces by automatic differentiation of the energy; training differentiates them again."""

    def force(q: torch.Tensor, p: torch.Tensor, wrt: int) -> torch.Tensor:
        with torch.enable_grad():
            if not differentiable:
                q, p = q.detach().requires_grad_(), p.detach().requires_grad_()
            total = energy(cell, torch.cat((q, p), -1)).sum()
            return torch.autograd.grad(total, (q, p)[wrt], create_graph=differentiable)[0]

    def step(state: torch.Tensor, action: torch.Tensor | None) -> torch.Tensor:
        q, p = state.chunk(2, -1)
        q = q + cell.time_step * force(q, p, 1)
        p = p - cell.time_step * force(q, p, 0)
        return torch.cat((q, p), -1)

    return step


def gru_cell_step(cell: GRU) -> Step:
    """torch's GRUCell, then LayerNorm."""

    def step(state: torch.Tensor, action: torch.Tensor | None) -> torch.Tensor:
        moved = torch.gru_cell(
            action, state, cell.weight_input, cell.weight_state, cell.bias_input, cell.bias_state
        )
        return F.layer_norm(
            moved, (state.shape[1],), cell.norm_weight, cell.norm_bias, cell.epsilon
        )

    return step


def gru_layer_step(cell: GRU) -> Step:
    """torch's nn.GRU on a sequence of one step, then LayerNorm, as the predictors of energy-based
    JEPA planners do it."""
    weights = [cell.weight_input, cell.weight_state, cell.bias_input, cell.bias_state]

    def step(state: torch.Tensor, action: torch.Tensor | None) -> torch.Tensor:
        moved = torch.gru(action[None], state[None], weights, True, 1, 0.0, False, False, False)[0]
        return F.layer_norm(
            moved, (state.shape[1],), cell.norm_weight, cell.norm_bias, cell.epsilon
        )[0]

    return step


def rollout(
    step: Step,
    states: torch.Tensor,
    horizon: int,
    actions: torch.Tensor | None,
    targets: torch.Tensor | None,
    output: str,
):
    """Every state, the last one, or the mean absolute error against targets (for q and p apart,
    `output` "halves")."""
    state, kept, total = states, [], states.new_zeros(())
    for k in range(horizon):
        state = step(state, None if actions is None else actions[k])
        if output == "states":
            kept.append(state)
        elif output == "loss":
            total = total + F.l1_loss(state, targets[k])
        elif output == "halves":
            total = total + 2 * F.l1_loss(state, targets[k])
    if output == "states":
        return torch.stack(kept)
    return state if output == "last" else total / horizon
