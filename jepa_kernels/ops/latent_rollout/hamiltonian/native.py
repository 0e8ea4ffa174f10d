"""The C++ kernels of a Hamiltonian, as `rollout.Kernels` asks for them."""

from __future__ import annotations

from .... import native
from .. import native_ops
from ..native_ops import floats
from ..readout.native import NativeReadout
from .rollout import half_steps_backward


class Native(NativeReadout):
    """See `rollout.Kernels`."""

    def recurrence(self, inputs, a, coupling):
        how = inputs.time_step, inputs.horizon, inputs.keeps_all, inputs.save, native.isa()
        return native_ops.OPS.latent_rollout_hamiltonian_fwd(
            a, *_given(inputs), coupling.rounded(), *how
        )

    def recurrence_backward(self, inputs, hidden, coupling, grad_sums):
        given, matrix = _given(inputs), coupling.rounded()

        def launch(a, step, transposed, moves, following, carried):
            return native_ops.OPS.latent_rollout_hamiltonian_bwd(
                a,
                *given,
                matrix,
                step if moves else 0.0,
                transposed,
                following,
                carried,
                native.isa(),
            )

        return half_steps_backward(inputs, hidden, given, coupling, grad_sums, launch)


def _given(inputs):
    weight, bias, energy = inputs.weights
    return weight.contiguous(), floats(bias), floats(energy)
