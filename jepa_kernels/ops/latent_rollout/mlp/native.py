"""The C++ kernels of a residual MLP, as `rollout.Kernels` asks for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .... import native
from .. import native_ops
from ..coupling import Coupling
from ..readout.native import NativeReadout
from .inputs import Inputs


class Native(NativeReadout):
    """See `rollout.Kernels`."""

    def recurrence(
        self, inputs: Inputs, a: torch.Tensor, coupling: Coupling, drift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if inputs.horizon == 1:
            return a[None] if inputs.save else a.new_empty(0), F.gelu(a)[None]
        how = inputs.horizon, inputs.keeps_all, inputs.save, native.isa()
        hidden, sums = native_ops.OPS.latent_rollout_mlp_fwd(a, coupling.rounded(), drift, *how)
        return hidden, sums

    def recurrence_backward(
        self, hidden: torch.Tensor, coupling: Coupling, grad_sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_hidden, activations = native_ops.OPS.latent_rollout_mlp_bwd(
            hidden, coupling.rounded(), grad_sums, native.isa()
        )
        return grad_hidden, activations
