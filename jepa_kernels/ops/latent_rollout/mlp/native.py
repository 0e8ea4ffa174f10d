"""The C++ kernels of a residual MLP, as `rollout.Kernels` asks for them."""

from __future__ import annotations

import torch.nn.functional as F

from .... import native
from .. import native_ops
from ..readout.native import NativeReadout


class Native(NativeReadout):
    """See `rollout.Kernels`."""

    def recurrence(self, inputs, a, coupling, drift):
        if inputs.horizon == 1:
            return a[None] if inputs.save else a.new_empty(0), F.gelu(a)[None]
        how = inputs.horizon, inputs.keeps_all, inputs.save, native.isa()
        return native_ops.OPS.latent_rollout_mlp_fwd(a, coupling.rounded(), drift, *how)

    def recurrence_backward(self, hidden, coupling, grad_sums):
        return native_ops.OPS.latent_rollout_mlp_bwd(
            hidden, coupling.rounded(), grad_sums, native.isa()
        )
