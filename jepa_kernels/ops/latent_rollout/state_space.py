"""GRU rollouts, which move the whole state: forward and backward through time around the kernels of a backend.

With g = W_i a + b_i and m = W_s z + b_s, split in three: r = sigmoid(g_r + m_r), u = sigmoid(g_u + m_u), n = tanh(g_n + r m_n),
z' = LayerNorm((1 - u) n + u z). Saved for backward: r, u, n and m_n of every step, and every state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F

from .arithmetic import add_matmul, fresh, matmul, power_mean, power_mean_gradient, take
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
        grad_states = fresh(states.shape, total, states.device)
        for k, residual in enumerate(_residuals(problem, states)):
            grad_states[k] = power_mean_gradient(residual, grad_out[k], problem.exponent)
        grad_targets = -grad_states if needs_targets else None
    else:
        grad_states = grad_out.to(total)
    # Transposed in memory: with so few columns a BLAS is faster that way.
    weight_input = problem.parameters[0].mT.contiguous().mT
    width, actions = problem.channels, problem.actions
    new = start.new_zeros
    grad_weight_state, grad_small = new(3 * width, width), new(1 + actions.shape[-1], 4 * width)
    grad_actions, grad_norm = new(actions.shape), (new(width), new(width))
    every_step = problem.output != "last"
    carried = None if every_step else grad_states
    for begin, end in _chunks(problem, start):
        before = states[begin - 1] if begin else start
        given = carried
        if every_step:
            given = grad_states[begin:end]
            if carried is not None:
                given = given.clone()
                given[-1] += carried
        grad_gates, carried, *norms = kernels.gru_recurrence_backward(
            *(before, actions[begin:end], states[begin:end], gates[begin:end]),
            *(problem.parameters, problem.scalar, given, every_step),
        )
        for sum_, part in zip(grad_norm, norms, strict=True):
            sum_ += part
        # grad_gates holds r, u, n and m_n: the action reaches r, u, n; the state reaches r, u, m_n.
        flat, given_actions = grad_gates.flatten(0, 1), actions[begin:end].flatten(0, 1)
        first = problem.num_rows
        for grads, state in ((flat[:first], before), (flat[first:], states[begin : end - 1].flatten(0, 1))):
            add_matmul(grad_weight_state[: 2 * width], grads[:, : 2 * width].mT, state, operand)
            add_matmul(grad_weight_state[2 * width :], grads[:, 3 * width :].mT, state, operand)
        # The biases and W_i in one pass. The other way round a BLAS takes ten times as long.
        add_matmul(grad_small, F.pad(given_actions, (1, 0), value=1.0).mT, flat, operand)
        grad_actions[begin:end] = matmul(flat[:, : 3 * width], weight_input, operand).view(actions[begin:end].shape)
    grad_bias = grad_small[0]
    biases = [grad_bias[: 3 * width].clone(), torch.cat((grad_bias[: 2 * width], grad_bias[3 * width :]))]
    parameters = [grad_small[1:, : 3 * width].mT, grad_weight_state, *biases, *grad_norm]
    return Gradients(carried, parameters, grad_actions, None, grad_targets)


def _chunks(problem: Problem, start: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Steps whose gate gradients are formed together, last first: on a CPU as many as fill the 32 MiB from which memory lies in huge pages."""
    size = problem.horizon if start.is_cuda else max(1, 2**23 // max(1, 4 * problem.channels * problem.num_rows))
    for end in range(problem.horizon, 0, -size):
        yield max(0, end - size), end


def _residuals(problem: Problem, states: torch.Tensor) -> Iterator[torch.Tensor]:
    for k, state in enumerate(states):
        yield state - take(*problem.target(k), 0, problem.channels)
