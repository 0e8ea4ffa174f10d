"""The specification of latent_rollout: the state itself is stepped, as the equations are written,
with ordinary autograd, any float dtype.

It shares nothing with the kernels: no hidden-space algebra, no hand-written derivative. The
Hamiltonian's forces come from automatic differentiation of the energy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .call import Call
from .cells import GRU, Cell, Hamiltonian, ResidualMLP, channel_ranges


def unsupported_reasons(call: Call) -> list[str]:
    return []


def step(cell: Cell, state: torch.Tensor, action: torch.Tensor | None) -> torch.Tensor:
    """One step of `cell` for states ``[rows, D]``."""
    if isinstance(cell, ResidualMLP):
        edges = channel_ranges(cell.in_channels, state.shape[-1])
        seen = torch.cat(
            [state[:, a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)], dim=-1
        )
        return state + F.linear(
            F.gelu(F.linear(seen, cell.weight_in, cell.bias_in)), cell.weight_out, cell.bias_out
        )
    if isinstance(cell, Hamiltonian):
        q, p = state.chunk(2, dim=-1)
        q = q + cell.time_step * torch.func.grad(_total_energy, argnums=2)(cell, q, p)
        p = p - cell.time_step * torch.func.grad(_total_energy, argnums=1)(cell, q, p)
        return torch.cat((q, p), dim=-1)
    return _gru_step(cell, state, action)


def energy(cell: Hamiltonian, state: torch.Tensor) -> torch.Tensor:
    """G of each row ``[rows]``, up to a constant."""
    first = F.gelu(F.linear(state, cell.weight_in, cell.bias_in))
    return F.linear(
        F.gelu(F.linear(first, cell.weight_hidden, cell.bias_hidden)), cell.weight_energy
    )[:, 0]


def _total_energy(cell: Hamiltonian, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return energy(cell, torch.cat((q, p), dim=-1)).sum()


def _gru_step(cell: GRU, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    from_action = F.linear(action, cell.weight_input, cell.bias_input).chunk(3, dim=-1)
    from_state = F.linear(state, cell.weight_state, cell.bias_state).chunk(3, dim=-1)
    reset = torch.sigmoid(from_action[0] + from_state[0])
    update = torch.sigmoid(from_action[1] + from_state[1])
    candidate = torch.tanh(from_action[2] + reset * from_state[2])
    mixed = (1 - update) * candidate + update * state
    return F.layer_norm(mixed, (state.shape[-1],), cell.norm_weight, cell.norm_bias, cell.epsilon)


def compose(
    states: torch.Tensor,
    cell: Cell,
    horizon: int,
    rows: torch.Tensor | None,
    actions: torch.Tensor | None,
    anchor: torch.Tensor | None,
    anchor_rows: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The predictions y_1 .. y_horizon, each ``[rows, D]``."""
    start = states if rows is None else states[rows]
    if anchor is not None and anchor_rows is not None:
        anchor = anchor[anchor_rows]
    state, predictions = start, []
    for k in range(horizon):
        state = step(cell, state, None if actions is None else actions[k])
        predictions.append(state if anchor is None else anchor + (state - start))
    return predictions


def errors(
    predictions: list[torch.Tensor],
    targets: torch.Tensor,
    target_rows: torch.Tensor | None,
    exponent: float,
    halves: bool,
) -> torch.Tensor:
    """e ``[horizon, rows]``: mean over channels of ``|y - target| ** exponent / exponent``; with
    `halves` the sum of the two halves' means."""
    values = []
    for k, prediction in enumerate(predictions):
        target = targets[k] if target_rows is None else targets[target_rows[k]]
        residual = (prediction - target).abs() ** exponent / exponent
        values.append(residual.mean(-1) * (2 if halves else 1))
    return torch.stack(values)
