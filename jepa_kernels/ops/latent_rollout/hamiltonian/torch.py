"""A Hamiltonian's rollout in eager PyTorch: hidden space, or state space where that is cheaper.

The baseline that kernels must beat, and what runs where no kernel does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...products import add_matmul, matmul
from ..coupling import Coupling
from ..kernel_backend import eager_backend
from ..readout.torch import EagerReadout
from . import rollout
from .inputs import Inputs

_INV_SQRT_2PI = 0.3989422804014327


def gelu_derivatives(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu'(x) = Phi(x) + x phi(x) and gelu''(x) = (2 - x^2) phi(x)."""
    density = torch.exp(-0.5 * x * x) * _INV_SQRT_2PI
    cumulative = 0.5 * (1 + torch.erf(x * 0.7071067811865476))
    return cumulative + x * density, (2 - x * x) * density


def _force(a: torch.Tensor, weights: rollout.Weights, operand: torch.dtype) -> torch.Tensor:
    """u = dG/da for G(a) = w3 gelu(W2 gelu(a) + b2)."""
    weight, bias, energy = weights
    slope, _ = gelu_derivatives(a)
    middle_slope, _ = gelu_derivatives(matmul(F.gelu(a), weight.mT, operand) + bias)
    return slope * matmul(energy * middle_slope, weight, operand)


def _force_backward(
    a: torch.Tensor,
    grad_force: torch.Tensor,
    weights: rollout.Weights,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor,
    grad_energy: torch.Tensor,
    operand: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `_force` to a (the Hessian of G times grad_force), and that of W2 added to
    grad_weight; those of b2 and w3 are added to grad_bias and grad_energy in place."""
    weight, bias, energy = weights
    slope, curvature = gelu_derivatives(a)
    activation = F.gelu(a)
    middle_slope, middle_curvature = gelu_derivatives(matmul(activation, weight.mT, operand) + bias)
    pulled = energy * middle_slope
    returned = matmul(pulled, weight, operand)
    grad_returned = slope * grad_force
    grad_pulled = matmul(grad_returned, weight.mT, operand)
    grad_middle = grad_pulled * energy * middle_curvature
    grad_weight = add_matmul(grad_weight, pulled.mT, grad_returned, operand)
    grad_weight = add_matmul(grad_weight, grad_middle.mT, activation, operand)
    grad_bias += grad_middle.sum(0)
    grad_energy += (grad_pulled * middle_slope).sum(0)
    moved = curvature * returned * grad_force + slope * matmul(grad_middle, weight, operand)
    return moved, grad_weight


class Eager(EagerReadout):
    """See `rollout.Kernels`."""

    def recurrence(self, inputs: Inputs, a: torch.Tensor, coupling: Coupling) -> rollout.Tensors:
        horizon, time_step, weights = inputs.horizon, inputs.time_step, inputs.weights
        hidden: list[torch.Tensor] = []
        kept: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for j in range(2 * horizon):
            which = j % 2
            hidden.append(a)
            force = _force(a, weights, coupling.operand)
            kept[which].append(kept[which][-1] + force if kept[which] else force)
            if j + 1 < 2 * horizon:
                moved = coupling.move(force, transposed=which == 1)
                a = a + moved * (-time_step if which else time_step)
        sums = torch.stack(
            [torch.stack(steps if inputs.keeps_all else steps[-1:]) for steps in kept]
        )
        return torch.stack(hidden) if inputs.save else a.new_empty(0), sums

    def recurrence_backward(
        self, inputs: Inputs, hidden: torch.Tensor, coupling: Coupling, grad_sums: torch.Tensor
    ) -> rollout.Tensors:
        time_step, weights, operand = inputs.time_step, inputs.weights, coupling.operand
        grad_weight: torch.Tensor | None = None
        grad_bias, grad_energy = (
            torch.zeros(w.shape, dtype=hidden.dtype, device=hidden.device) for w in weights[1:]
        )
        carried = torch.zeros_like(hidden[0])
        last = hidden.shape[0] - 1
        every_step = 2 * grad_sums.shape[1] > last
        following = [torch.zeros_like(carried)] * 2 if every_step else list(grad_sums[:, 0])
        for j in reversed(range(hidden.shape[0])):
            which, step = j % 2, -time_step if j % 2 else time_step
            if every_step:
                following[which] = following[which] + grad_sums[which][j // 2]
            grad_force = following[which]
            if j < last:
                force = _force(hidden[j], weights, operand)
                coupling.add_gradient(carried * step, force, transposed=which == 1)
                grad_force = grad_force + coupling.move(carried, transposed=which == 0) * step
            grad_a, grad_weight = _force_backward(
                hidden[j], grad_force, weights, grad_weight, grad_bias, grad_energy, operand
            )
            carried = carried + grad_a
        assert grad_weight is not None  # there are two half-steps at least
        return carried, grad_weight, grad_bias, grad_energy


BACKEND = eager_backend(rollout, Eager())
