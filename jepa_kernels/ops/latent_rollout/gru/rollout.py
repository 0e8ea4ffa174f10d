"""The rollout of a GRU, which moves its whole state: forward and backward through time around the
kernels of a backend.

With g = W_i a + b_i and m = W_s z + b_s, split in three: r = sigmoid(g_r + m_r), u = sigmoid(g_u +
m_u), n = tanh(g_n + r m_n), z' = LayerNorm((1 - u) n + u z). Saved for backward: r, u, n and m_n of
every step, and every state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from ...products import add_matmul, matmul
from ..arithmetic import fresh, power_mean, power_mean_gradient, take
from .inputs import Inputs


class GateGradients(NamedTuple):
    """What the backward pass of some steps yields. Products with the states, one matrix product
    over all rows, are left to `backward`.

    Attributes:
        of_state: gradients of W_s z + b_s ``[steps, rows, *]``, parts that make 3 D side by side.
        start: ``[rows, D]``; actions: ``[steps, rows, A]``.
        small: ``[1 + A, 4 D]``, those of r, u, n and m_n summed over rows and steps, then times
            each action.
        norm_weight, norm_bias: ``[D]``.
    """

    of_state: list[torch.Tensor]
    start: torch.Tensor
    actions: torch.Tensor
    small: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor


class Kernels(Protocol):
    """What a backend computes for a GRU, in the accumulation dtype, over the steps of the given
    actions. Gates are r, u, n and m_n ``[steps, rows, 4 D]``."""

    def recurrence(
        self,
        inputs: Inputs,
        start: torch.Tensor,
        actions: torch.Tensor,
        keep_all: bool,
        save: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States ``[steps, rows, D]`` (``[1, rows, D]``, the last one, without `keep_all`), and
        gates (empty without `save`)."""

    def recurrence_backward(
        self,
        inputs: Inputs,
        start: torch.Tensor,
        actions: torch.Tensor,
        states: torch.Tensor,
        gates: torch.Tensor,
        grad_states: torch.Tensor,
    ) -> GateGradients:
        """The gradients, from those of every state or, where the result is the last one, of
        that."""


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
    into = matmul(flat[:, : 3 * width], weight_input.mT.contiguous().mT, operand)
    of_state = [grad_gates[..., : 2 * width], grad_gates[..., 3 * width :]]
    return GateGradients(of_state, start, into.view(actions.shape), small, norm_weight, norm_bias)


def forward(inputs: Inputs, kernels: Kernels) -> tuple[torch.Tensor, ...]:
    """The result, then what backward needs: gates and states."""
    keep_all, save = inputs.keeps_all, inputs.save
    start = inputs.start().to(inputs.accumulate_dtype)
    nothing = start.new_empty(0)
    if inputs.output == "errors" and not save:
        return _errors_alone(inputs, kernels, start), nothing, nothing.clone()
    states, gates = kernels.recurrence(inputs, start, inputs.actions, keep_all or save, save)
    if inputs.output == "errors":
        out = torch.stack(_errors(inputs, states, 0))
    else:
        # The op's output must not be the tensor that is saved: it would be one alias of the other.
        out = (states if keep_all else states[-1]).to(inputs.dtype, copy=save)
    return out, gates, states if save else nothing


def backward(
    inputs: Inputs,
    kernels: Kernels,
    saved: list[torch.Tensor],
    grad_out: torch.Tensor,
    needs_targets: bool,
) -> dict[str, torch.Tensor | None]:
    """Gradients of every input by name, one row per rollout row."""
    gates, states = saved
    total, width, actions = inputs.accumulate_dtype, inputs.channels, inputs.actions
    start = inputs.start().to(total)
    grad_targets = None
    if inputs.output == "errors":
        grad_states = fresh(states.shape, total, states.device)
        for k, residual in enumerate(_residuals(inputs, states, 0)):
            grad_states[k] = power_mean_gradient(residual, grad_out[k], inputs.exponent)
        grad_targets = -grad_states if needs_targets else None
    else:
        grad_states = grad_out.to(total)
    new = start.new_zeros
    grad_weight_state, grad_small = new(3 * width, width), new(1 + actions.shape[-1], 4 * width)
    grad_actions, grad_norm = new(actions.shape), (new(width), new(width))
    carried: torch.Tensor | None = None if inputs.keeps_all else grad_states
    for begin, end in _chunks(inputs, start):
        before = states[begin - 1] if begin else start
        given = grad_states[begin:end] if inputs.keeps_all or carried is None else carried
        if inputs.keeps_all and carried is not None:
            given = given.clone()
            given[-1] += carried
        step = kernels.recurrence_backward(
            inputs, before, actions[begin:end], states[begin:end], gates[begin:end], given
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
                into = grad_weight_state[row : row + grads.shape[1]]
                add_matmul(into, grads.mT, state, inputs.dtype)
                row += grads.shape[1]
    grad_bias = grad_small[0]
    return {
        "states": carried,
        "targets": grad_targets,
        "actions": grad_actions,
        "weight_input": grad_small[1:, : 3 * width].mT,
        "weight_state": grad_weight_state,
        "bias_input": grad_bias[: 3 * width].clone(),
        "bias_state": torch.cat((grad_bias[: 2 * width], grad_bias[3 * width :])),
        "norm_weight": grad_norm[0],
        "norm_bias": grad_norm[1],
    }


def _steps_at_once(inputs: Inputs, bytes_per_row: int) -> int:
    """On a CPU as many as 32 MiB hold: up to there malloc keeps memory for the next such tensor."""
    return max(1, 2**25 // max(1, bytes_per_row * inputs.num_rows))


def _chunks(inputs: Inputs, start: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Steps whose gate gradients are formed together, last first."""
    size = inputs.horizon
    if not start.is_cuda:
        size = _steps_at_once(inputs, 3 * inputs.channels * inputs.states.element_size())
    for end in range(inputs.horizon, 0, -size):
        yield max(0, end - size), end


def _errors_alone(inputs: Inputs, kernels: Kernels, state: torch.Tensor) -> torch.Tensor:
    """Errors of every step where no gradient is wanted: a few states at a time, whatever the
    horizon."""
    size, errors = _steps_at_once(inputs, 4 * inputs.channels), []
    for begin in range(0, inputs.horizon, size):
        actions = inputs.actions[begin : begin + size]
        states, _ = kernels.recurrence(inputs, state, actions, True, False)
        errors += _errors(inputs, states, begin)
        state = states[-1]
    return torch.stack(errors)


def _errors(inputs: Inputs, states: torch.Tensor, first_step: int) -> list[torch.Tensor]:
    return [power_mean(r, inputs.exponent) for r in _residuals(inputs, states, first_step)]


def _residuals(inputs: Inputs, states: torch.Tensor, first_step: int) -> Iterator[torch.Tensor]:
    for k, state in enumerate(states, first_step):
        yield state - take(*inputs.target(k), 0, inputs.channels)
