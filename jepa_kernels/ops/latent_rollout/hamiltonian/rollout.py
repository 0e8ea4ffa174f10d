"""The rollout of a Hamiltonian in its hidden space, forward and backward through time, around the
kernels of a backend.

It only reads a = W1 x + b1. With u(a) = dG/da, W1 = [Wq Wp] and C = Wq Wp^T a step is two halves:
    b_i = a_i + dt C u(a_i),   a_{i+1} = b_i - dt C^T u(b_i),   q_k = q_0 + dt Wp^T sum u(a_i),
    p_k = p_0 - dt Wq^T sum u(b_i).
Backward is the transpose of these lines, last half-step first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ...products import add_matmul
from ..coupling import Coupling
from ..hidden_space import enter, leave
from ..readout.parts import Part, Readout, read_out, read_out_backward
from .inputs import Inputs

Tensors = tuple[torch.Tensor, ...]
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # W2, b2 and w3


class Kernels(Readout, Protocol):
    """What a backend computes for a Hamiltonian, in the accumulation dtype."""

    def recurrence(self, inputs: Inputs, a: torch.Tensor, coupling: Coupling) -> Tensors:
        """a_0, b_0, a_1, ... ``[2 horizon, rows, h]`` (empty unless saved), and the kept sums of
        u(a_i) and of u(b_i) ``[2, kept steps, rows, h]``."""

    def recurrence_backward(
        self, inputs: Inputs, hidden: torch.Tensor, coupling: Coupling, grad_sums: torch.Tensor
    ) -> Tensors:
        """The gradients of a_0, W2, b2 and w3; adds that of C to the coupling."""


def forward(inputs: Inputs, kernels: Kernels) -> Tensors:
    """The result, then what backward needs: residual signs, hidden states and sums."""
    a = enter(inputs)
    hidden, sums = kernels.recurrence(inputs, a, _coupling(inputs, kernels))
    out, signs = read_out(inputs, kernels, _parts(inputs), sums)
    return out, signs, hidden, sums if inputs.save else a.new_empty(0)


def backward(
    inputs: Inputs,
    kernels: Kernels,
    saved: list[torch.Tensor],
    grad_out: torch.Tensor,
    needs_targets: bool,
) -> dict[str, torch.Tensor | None]:
    """Gradients of every input by name, one row per rollout row."""
    hidden, half, dt = saved[1], inputs.channels // 2, inputs.time_step
    read = read_out_backward(inputs, kernels, _parts(inputs), saved, grad_out, needs_targets)
    coupling = _coupling(inputs, kernels)
    grad_a, *grads = kernels.recurrence_backward(inputs, hidden, coupling, read.sums)
    grad_weight_in = torch.empty(
        inputs.weight_in.shape, dtype=inputs.accumulate_dtype, device=hidden.device
    )
    (grad_read_q, _), (grad_read_p, _) = read.parts
    grad_left, grad_right = coupling.gradients()
    grad_weight_in[:, half:] = grad_read_q * dt + grad_right.mT
    grad_weight_in[:, :half] = grad_read_p * -dt + grad_left
    own = dict(zip(("weight_hidden", "bias_hidden", "weight_energy"), grads, strict=True))
    return leave(inputs, grad_a, grad_weight_in, read) | own


def half_steps_backward(
    inputs: Inputs,
    hidden: torch.Tensor,
    weights: Weights,
    coupling: Coupling,
    grad_sums: torch.Tensor,
    launch: Callable[..., Tensors],
) -> Tensors:
    """`Kernels.recurrence_backward` by one launch for each half-step, with the weights as the
    kernel reads them.

    ``launch(a, step, transposed, moves, following, carried)`` adds to `carried` and returns u(a),
    [pulled; grad_middle], [grad_returned; gelu(a)], whose product is the gradient of W2, and rows
    whose sum is that of w3.
    """
    weight, bias, energy = weights
    grad_weight: torch.Tensor | None = None
    grad_bias, grad_energy = torch.zeros_like(bias), torch.zeros_like(energy)
    carried = torch.zeros_like(hidden[0])
    last = hidden.shape[0] - 1
    every_step = 2 * grad_sums.shape[1] > last
    following = (
        [torch.zeros_like(carried) for _ in range(2)] if every_step else list(grad_sums[:, 0])
    )
    for j in reversed(range(hidden.shape[0])):
        which, moves = j % 2, j < last
        step = -inputs.time_step if which else inputs.time_step
        if every_step:
            following[which] += grad_sums[which][j // 2]
        moved_by = carried * step if moves else None
        force, left, right, energy_rows = launch(
            hidden[j], step, which == 1, moves, following[which], carried
        )
        grad_weight = add_matmul(
            grad_weight, left.flatten(0, 1).mT, right.flatten(0, 1), weight.dtype
        )
        grad_bias += left[1].sum(0)
        grad_energy += energy_rows.sum(0)
        if moved_by is not None:
            coupling.add_gradient(moved_by, force, transposed=which == 1)
    assert grad_weight is not None  # there are two half-steps at least
    return carried, grad_weight, grad_bias, grad_energy


def _parts(inputs: Inputs) -> list[Part]:
    half, dt, weight = inputs.channels // 2, inputs.time_step, inputs.weight_in
    return [
        Part(0, half, weight[:, half:] * dt, None),
        Part(half, inputs.channels, weight[:, :half] * -dt, None),
    ]


def _coupling(inputs: Inputs, kernels: Kernels) -> Coupling:
    half, dense = inputs.channels // 2, not kernels.cheaper_space or inputs.space() == "hidden"
    weight_in = inputs.weight_in
    return Coupling(weight_in[:, :half], weight_in[:, half:].mT, dense, inputs.dtype)
