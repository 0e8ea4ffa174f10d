"""Triton backend of a residual MLP's rollout, plain products through torch.

All steps of a pass take one launch: a program keeps the hidden state of its rows in registers and
streams the coupling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..coupling import Coupling
from ..readout.triton import TritonReadout
from ..triton_launch import ROWS, tiles, triton_backend
from . import rollout
from .inputs import Inputs

WIDEST = 512


class Triton(TritonReadout):
    """See `rollout.Kernels`."""

    def recurrence(
        self, inputs: Inputs, a: torch.Tensor, coupling: Coupling, drift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from .triton_kernels import mlp_fwd_kernel

        if inputs.horizon == 1:
            return a[None] if inputs.save else a.new_empty(0), F.gelu(a)[None]
        rows, hidden = a.shape
        sums = a.new_empty((inputs.kept_steps, rows, hidden))
        saved = a.new_empty((inputs.horizon, rows, hidden) if inputs.save else (0,))
        matrix = coupling.rounded()
        assert matrix is not None  # without cheaper_space
        if rows:
            mlp_fwd_kernel[(-(-rows // ROWS),)](
                a,
                matrix,
                drift,
                sums,
                saved,
                matrix.new_empty((rows, hidden)),
                rows,
                inputs.horizon,
                hidden,
                hidden,
                KEEP=inputs.keeps_all,
                SAVE=inputs.save,
                **tiles(hidden, matrix.dtype),
            )
        return saved, sums

    def recurrence_backward(
        self, hidden: torch.Tensor, coupling: Coupling, grad_sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from .triton_kernels import mlp_bwd_kernel

        horizon, rows, width = hidden.shape
        if horizon == 1:
            return torch.ops.aten.gelu_backward(grad_sums, hidden), hidden[:0]
        grad_inputs, activations = torch.empty_like(hidden), torch.empty_like(hidden[1:])
        matrix = coupling.rounded()
        assert matrix is not None  # without cheaper_space
        if rows:
            mlp_bwd_kernel[(-(-rows // ROWS),)](
                hidden,
                matrix,
                grad_sums,
                grad_inputs,
                activations,
                matrix.new_empty((rows, width)),
                rows,
                horizon,
                width,
                width,
                KEPT=grad_sums.shape[0] > 1,
                **tiles(width, matrix.dtype),
            )
        return grad_inputs, activations


BACKEND = triton_backend(rollout, Triton(), WIDEST)
