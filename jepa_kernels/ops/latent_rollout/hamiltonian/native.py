"""The C++ kernels of a Hamiltonian, as `rollout.Kernels` asks for them."""

from __future__ import annotations

import torch

from .... import native
from .. import native_ops
from ..coupling import Coupling
from ..native_ops import floats
from ..readout.native import NativeReadout
from .inputs import Inputs
from .rollout import Tensors, Weights, half_steps_backward


class Native(NativeReadout):
    """See `rollout.Kernels`."""

    def recurrence(self, inputs: Inputs, a: torch.Tensor, coupling: Coupling) -> Tensors:
        how = inputs.time_step, inputs.horizon, inputs.keeps_all, inputs.save, native.isa()
        made: Tensors = native_ops.OPS.latent_rollout_hamiltonian_fwd(
            a, *_given(inputs), coupling.rounded(), *how
        )
        return made

    def recurrence_backward(
        self, inputs: Inputs, hidden: torch.Tensor, coupling: Coupling, grad_sums: torch.Tensor
    ) -> Tensors:
        given, matrix = _given(inputs), coupling.rounded()

        def launch(
            a: torch.Tensor,
            step: float,
            transposed: bool,
            moves: bool,
            following: torch.Tensor,
            carried: torch.Tensor,
        ) -> Tensors:
            made: Tensors = native_ops.OPS.latent_rollout_hamiltonian_bwd(
                a,
                *given,
                matrix,
                step if moves else 0.0,
                transposed,
                following,
                carried,
                native.isa(),
            )
            return made

        return half_steps_backward(inputs, hidden, given, coupling, grad_sums, launch)


def _given(inputs: Inputs) -> Weights:
    weight, bias, energy = inputs.weights
    return weight.contiguous(), floats(bias), floats(energy)
