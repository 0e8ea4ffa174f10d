"""GRU rollouts, which move the whole state: forward and backward through time around the kernels of a backend.

With g = W_i a + b_i and m = W_s z + b_s, split in three: r = sigmoid(g_r + m_r), u = sigmoid(g_u + m_u), n = tanh(g_n + r m_n),
z' = LayerNorm((1 - u) n + u z). Saved for backward: r, u, n and m_n of every step, and every state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from .arithmetic import add_matmul, matmul, power_mean, power_mean_gradient, take
from .hidden_space import Gradients
from .problem import Problem

Tensors = tuple[torch.Tensor, ...]


class Kernels(Protocol):
    """What a backend computes for a GRU. States are ``[horizon, rows, D]`` (``[1, rows, D]`` the last one), gates ``[horizon, rows, 4 D]``."""

    def gru_recurrence(self, start, actions, weights: list[torch.Tensor], epsilon: float, keep_all: bool, save: bool) -> Tensors: ...

    def gru_recurrence_backward(
        self, start, actions, states, gates, weights: list[torch.Tensor], epsilon: float, grad_states, every_step: bool
    ) -> Tensors: ...


def forward(problem: Problem, kernels: Kernels) -> Tensors:
    """The output, then what backward needs: nothing, gates and states."""
    keep_all = problem.output != "last"
    start = problem.start().to(problem.accumulate_dtype)
    states, gates = kernels.gru_recurrence(
        start, problem.actions, problem.parameters, problem.scalar, keep_all or problem.save, problem.save
    )
    nothing = start.new_empty(0)
    if problem.output == "errors":
        out = torch.stack([power_mean(residual, problem.exponent) for residual in _residuals(problem, states)])
    else:
        # The op's output must not be the tensor that is saved: it would be one alias of the other.
        out = (states if keep_all else states[-1]).to(problem.states.dtype, copy=problem.save)
    return out, nothing.to(torch.uint8), gates, states if problem.save else nothing


def backward(problem: Problem, kernels: Kernels, grad_out: torch.Tensor, saved: Tensors, needs_targets: bool) -> Gradients:
    """Gradients of every input, per row: scattering gathered rows back is left to the op."""
    _, gates, states = saved
    operand, total = problem.states.dtype, problem.accumulate_dtype
    start = problem.start().to(total)
    grad_targets = None
    if problem.output == "errors":
        grad_states = torch.empty_like(states)
        for k, residual in enumerate(_residuals(problem, states)):
            grad_states[k] = power_mean_gradient(residual, grad_out[k], problem.exponent)
        grad_targets = -grad_states if needs_targets else None
    else:
        grad_states = grad_out.to(total)
    grad_gates, grad_start, grad_norm_weight, grad_norm_bias = kernels.gru_recurrence_backward(
        start, problem.actions, states, gates, problem.parameters, problem.scalar, grad_states, problem.output != "last"
    )
    weight_input = problem.parameters[0]
    width, actions = problem.channels, problem.actions
    # grad_gates holds r, u, n and m_n: the action reaches r, u, n; the state reaches r, u, m_n.
    from_action = grad_gates[..., : 3 * width].flatten(0, 1)
    flat = grad_gates.flatten(0, 1)
    # Few columns: the other way round a BLAS takes ten times as long.
    grad_weight_input = matmul(actions.flatten(0, 1).mT, from_action, operand).mT
    grad_weight_state = torch.zeros((3 * width, width), dtype=total, device=start.device)
    first = problem.num_rows
    for grads, state in ((flat[:first], start), (flat[first:], states[:-1].flatten(0, 1))):
        add_matmul(grad_weight_state[: 2 * width], grads[:, : 2 * width].mT, state, operand)
        add_matmul(grad_weight_state[2 * width :], grads[:, 3 * width :].mT, state, operand)
    sums = flat.sum(0)
    grad_bias_state = torch.cat((sums[: 2 * width], sums[3 * width :]))
    grad_actions = matmul(from_action, weight_input, operand).view(actions.shape)
    parameters = [grad_weight_input, grad_weight_state, sums[: 3 * width].clone(), grad_bias_state, grad_norm_weight, grad_norm_bias]
    return Gradients(grad_start, parameters, grad_actions, None, grad_targets)


def _residuals(problem: Problem, states: torch.Tensor) -> Iterator[torch.Tensor]:
    for k, state in enumerate(states):
        yield state - take(*problem.target(k), 0, problem.channels)
