"""A residual MLP's rollout in eager PyTorch: hidden space, or state space where that is cheaper.

The baseline that kernels must beat, and what runs where no kernel does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..coupling import Coupling
from ..kernel_backend import eager_backend
from ..readout.torch import EagerReadout
from . import rollout
from .inputs import Inputs


class Eager(EagerReadout):
    """See `rollout.Kernels`."""

    def recurrence(
        self, inputs: Inputs, a: torch.Tensor, coupling: Coupling, drift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, sums = [a], [F.gelu(a)]
        activation = sums[0]
        for _ in range(inputs.horizon - 1):
            assert drift is not None  # there is more than one step
            a = a + coupling.move(activation) + drift
            activation = F.gelu(a)
            hidden.append(a)
            sums.append(sums[-1] + activation)
        kept = torch.stack(sums if inputs.keeps_all else sums[-1:])
        return torch.stack(hidden) if inputs.save else a.new_empty(0), kept

    def recurrence_backward(
        self, hidden: torch.Tensor, coupling: Coupling, grad_sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        horizon = hidden.shape[0]
        grad_hidden = torch.empty_like(hidden)
        following = grad_sums[-1]
        grad_hidden[-1] = torch.ops.aten.gelu_backward(following, hidden[-1])
        for i in reversed(range(horizon - 1)):
            if grad_sums.shape[0] > 1:
                following = following + grad_sums[i]
            moved = coupling.move(grad_hidden[i + 1], transposed=True)
            grad_hidden[i] = grad_hidden[i + 1] + torch.ops.aten.gelu_backward(
                following + moved, hidden[i]
            )
        return grad_hidden, F.gelu(hidden[:-1])


BACKEND = eager_backend(rollout, Eager())
