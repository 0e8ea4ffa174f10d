"""GRU rollouts, which move the whole state: forward and backward through time around the kernels of
a backend.

With g = W_i a + b_i and m = W_s z + b_s, split in three: r = sigmoid(g_r + m_r), u = sigmoid(g_u +
m_u), n = tanh(g_n + r m_n), z' = LayerNorm((1 - u) n + u z). Saved for backward: r, u, n and m_n of
every step, and every state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from .arithmetic import add_matmul, fresh, matmul, power_mean, power_mean_gradient, take
from .hidden_space import Gradients
from .problem import Problem

Tensors = tuple[torch.Tensor, ...]


class GateGradients(NamedTuple):
    """What the backward pass of some steps yields. Products with the states, one matrix product
    over all rows, are left to `backward`."""

    of_state: list[
        torch.Tensor
    ]  # gradients of W_s z + b_s, ``[steps, rows, *]``: parts that make 3 D side by side
    start: torch.Tensor  # [rows, D]
    actions: torch.Tensor  # [steps, rows, A]
    small: (
        torch.Tensor
    )  # [1 + A, 4 D]: those of r, u, n and m_n summed over rows and steps, then times each action
    norm_weight: torch.Tensor  # [D]
    norm_bias: torch.Tensor  # [D]


class Kernels(Protocol):
    """What a backend computes for a GRU. States are ``[horizon, rows, D]`` (``[1, rows, D]`` the
    last one), gates ``[horizon, rows, 4 D]``."""

    def gru_recurrence(
        self,
        start,
        actions,
        weights: list[torch.Tensor],
        epsilon: float,
        keep_all: bool,
        save: bool,
    ) -> Tensors: ...

    def gru_recurrence_backward(
        self,
        start,
        actions,
        states,
        gates,
        weights: list[torch.Tensor],
        epsilon: float,
        grad_states,
        every_step: bool,
    ) -> GateGradients: ...


def with_action_products(
    grad_gates: torch.Tensor,
    start: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    actions: torch.Tensor,
    weight_input: torch.Tensor,
) -> GateGradients:
    """For kernels that return the gradients of r, u, n and m_n, ``[steps, rows, 4 D]``, and leave
    the products with actions to a BLAS."""
    width, operand = start.shape[1], weight_input.dtype
    flat = grad_gates.flatten(0, 1)
    # The biases and W_i in one pass. The other way round a BLAS takes ten times as long.
    small = matmul(F.pad(actions.flatten(0, 1), (1, 0), value=1.0).mT, flat, operand)
    # Transposed in memory: with so few columns a BLAS is faster that way.
    into = matmul(flat[:, : 3 * width], weight_input.mT.contiguous().mT, operand).view(
        actions.shape
    )
    of_state = [grad_gates[..., : 2 * width], grad_gates[..., 3 * width :]]
    return GateGradients(of_state, start, into, small, norm_weight, norm_bias)


def forward(problem: Problem, kernels: Kernels) -> Tensors:
    """The output, then what backward needs: nothing, gates and states."""
    keep_all = problem.output != "last"
    start = problem.start().to(problem.accumulate_dtype)
    if problem.output == "errors" and not problem.save:
        no_signs, no_gates, no_states = (
            start.new_empty(0, dtype=torch.uint8),
            start.new_empty(0),
            start.new_empty(0),
        )
        return _errors_alone(problem, kernels, start), no_signs, no_gates, no_states
    states, gates = kernels.gru_recurrence(
        start,
        problem.actions,
        problem.parameters,
        problem.scalar,
        keep_all or problem.save,
        problem.save,
    )
    nothing = start.new_empty(0)
    if problem.output == "errors":
        out = torch.stack(_errors(problem, states, 0))
    else:
        # The op's output must not be the tensor that is saved: it would be one alias of the other.
        out = (states if keep_all else states[-1]).to(problem.states.dtype, copy=problem.save)
    return out, nothing.to(torch.uint8), gates, states if problem.save else nothing


def backward(
    problem: Problem, kernels: Kernels, grad_out: torch.Tensor, saved: Tensors, needs_targets: bool
) -> Gradients:
    """Gradients of every input, per row: scattering gathered rows back is left to the op."""
    _, gates, states = saved
    operand, total = problem.states.dtype, problem.accumulate_dtype
    start = problem.start().to(total)
    grad_targets = None
    if problem.output == "errors":
        grad_states = fresh(states.shape, total, states.device)
        for k, residual in enumerate(_residuals(problem, states, 0)):
            grad_states[k] = power_mean_gradient(residual, grad_out[k], problem.exponent)
        grad_targets = -grad_states if needs_targets else None
    else:
        grad_states = grad_out.to(total)
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
        step = kernels.gru_recurrence_backward(
            *(before, actions[begin:end], states[begin:end], gates[begin:end]),
            *(problem.parameters, problem.scalar, given, every_step),
        )
        carried = step.start
        grad_actions[begin:end] = step.actions
        for sum_, part in zip(
            (grad_small, *grad_norm), (step.small, step.norm_weight, step.norm_bias), strict=True
        ):
            sum_ += part
        for seen, state in (
            (slice(0, 1), before),
            (slice(1, None), states[begin : end - 1].flatten(0, 1)),
        ):
            row = 0
            for part in step.of_state:
                grads = part[seen].flatten(0, 1)
                add_matmul(grad_weight_state[row : row + grads.shape[1]], grads.mT, state, operand)
                row += grads.shape[1]
    grad_bias = grad_small[0]
    biases = [
        grad_bias[: 3 * width].clone(),
        torch.cat((grad_bias[: 2 * width], grad_bias[3 * width :])),
    ]
    parameters = [grad_small[1:, : 3 * width].mT, grad_weight_state, *biases, *grad_norm]
    return Gradients(carried, parameters, grad_actions, None, grad_targets)


def _steps_at_once(problem: Problem, bytes_per_row: int) -> int:
    """On a CPU as many as 32 MiB hold: up to there malloc keeps memory for the next such tensor."""
    return max(1, 2**25 // max(1, bytes_per_row * problem.num_rows))


def _chunks(problem: Problem, start: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Steps whose gate gradients are formed together, last first."""
    size = (
        problem.horizon
        if start.is_cuda
        else _steps_at_once(problem, 3 * problem.channels * problem.states.element_size())
    )
    for end in range(problem.horizon, 0, -size):
        yield max(0, end - size), end


def _errors_alone(problem: Problem, kernels: Kernels, state: torch.Tensor) -> torch.Tensor:
    """Errors of every step where no gradient is wanted: a few states at a time, whatever the
    horizon."""
    size, errors = _steps_at_once(problem, 4 * problem.channels), []
    for begin in range(0, problem.horizon, size):
        actions = problem.actions[begin : begin + size]
        states, _ = kernels.gru_recurrence(
            state, actions, problem.parameters, problem.scalar, True, False
        )
        errors += _errors(problem, states, begin)
        state = states[-1]
    return torch.stack(errors)


def _errors(problem: Problem, states: torch.Tensor, first_step: int) -> list[torch.Tensor]:
    return [
        power_mean(residual, problem.exponent)
        for residual in _residuals(problem, states, first_step)
    ]


def _residuals(problem: Problem, states: torch.Tensor, first_step: int) -> Iterator[torch.Tensor]:
    for k, state in enumerate(states, first_step):
        yield state - take(*problem.target(k), 0, problem.channels)
