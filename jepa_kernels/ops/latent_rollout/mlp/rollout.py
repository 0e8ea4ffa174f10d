"""The rollout of a residual MLP in its hidden space, forward and backward through time, around the
kernels of a backend.

It only reads a = W1 x + b1, and its moves lie in the span of W2's columns. With C = W1 W2 (the rows
of W2 that W1 reads): a_0 = W1 x_0 + b1,   a_{i+1} = a_i + C gelu(a_i) + W1 b2,
    s_k = sum_{i<k} gelu(a_i),   y_k = base + W2 s_k + k b2.
Backward is the transpose of these lines, last step first.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ...products import matmul
from ..coupling import Coupling
from ..hidden_space import add_columns, columns, enter, leave
from ..readout.parts import Part, Readout, read_out, read_out_backward
from .inputs import Inputs


class Kernels(Readout, Protocol):
    """What a backend computes for a residual MLP, in the accumulation dtype."""

    def recurrence(
        self, inputs: Inputs, a: torch.Tensor, coupling: Coupling, drift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """a_0 .. a_{horizon-1} ``[horizon, rows, h]`` (empty unless saved), and the kept ones of
        s_1 .. s_horizon ``[kept steps, rows, h]``."""

    def recurrence_backward(
        self, hidden: torch.Tensor, coupling: Coupling, grad_sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of every a_i, and gelu(a_i) of all but the last."""


def forward(inputs: Inputs, kernels: Kernels) -> tuple[torch.Tensor, ...]:
    """The result, then what backward needs: residual signs, hidden states and sums."""
    a, drift = enter(inputs), None
    if inputs.horizon > 1:  # W1 b2, by which every step moves the hidden state
        bias = columns(inputs.bias_out, inputs.in_channels, 0)
        drift = matmul(inputs.weight_in, bias[:, None], inputs.accumulate_dtype)[:, 0]
    hidden, sums = kernels.recurrence(inputs, a, _coupling(inputs, kernels), drift)
    out, signs = read_out(inputs, kernels, _parts(inputs), sums[None])
    return out, signs, hidden, sums[None] if inputs.save else a.new_empty(0)


def backward(
    inputs: Inputs,
    kernels: Kernels,
    saved: list[torch.Tensor],
    grad_out: torch.Tensor,
    needs_targets: bool,
) -> dict[str, torch.Tensor | None]:
    """Gradients of every input by name, one row per rollout row."""
    hidden, total = saved[1], inputs.accumulate_dtype
    read = read_out_backward(inputs, kernels, _parts(inputs), saved, grad_out, needs_targets)
    coupling = _coupling(inputs, kernels)
    grad_hidden, activations = kernels.recurrence_backward(hidden, coupling, read.sums[0])
    grad_weight_in = None
    ((grad_weight_out, grad_bias_out),) = read.parts
    assert grad_bias_out is not None  # the part has a bias
    grad_weight_out = grad_weight_out.mT
    if inputs.horizon > 1:
        moved = grad_hidden[1:].flatten(0, 1)
        coupling.add_gradient(moved, activations.flatten(0, 1))
        grad_left, grad_right = coupling.gradients()
        grad_drift = moved.sum(0).to(total)
        bias_seen = columns(inputs.bias_out, inputs.in_channels, 0).to(total)
        grad_weight_in = grad_left.addr_(grad_drift, bias_seen)
        add_columns(grad_weight_out, grad_right, inputs.in_channels, 0)
        drift_bias = inputs.weight_in.mT.to(total) @ grad_drift
        add_columns(grad_bias_out, drift_bias, inputs.in_channels, 0)
    own = {"weight_out": grad_weight_out, "bias_out": grad_bias_out}
    return leave(inputs, grad_hidden[0], grad_weight_in, read) | own


def _parts(inputs: Inputs) -> list[Part]:
    return [Part(0, inputs.channels, inputs.weight_out.mT, inputs.bias_out.contiguous())]


def _coupling(inputs: Inputs, kernels: Kernels) -> Coupling:
    """C, which a single step does not use."""
    if inputs.horizon == 1:
        return Coupling(inputs.weight_in, inputs.weight_in, False, inputs.dtype)
    right = columns(inputs.weight_out, inputs.in_channels, 0)
    dense = not kernels.cheaper_space or inputs.space() == "hidden"
    return Coupling(inputs.weight_in, right, dense, inputs.dtype)
