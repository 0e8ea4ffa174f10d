"""The C++ kernels of a Hamiltonian, as `rollout.Kernels` asks for them."""

from __future__ import annotations

from .... import native
from .. import native_ops
from ..native_ops import floats
from ..readout.native import NativeReadout
from .rollout import half_steps_backward


class Native(NativeReadout):
    """See `rollout.Kernels`."""

    def recurrence(self, a, weights, coupling, time_step, horizon, keep_all, save):
        return native_ops.OPS.latent_rollout_hamiltonian_fwd(
            a,
            *_given(weights),
            coupling.rounded(),
            time_step,
            horizon,
            keep_all,
            save,
            native.isa(),
        )

    def recurrence_backward(self, hidden, weights, coupling, time_step, grad_sums):
        given, matrix = _given(weights), coupling.rounded()

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

        return half_steps_backward(hidden, given, coupling, time_step, grad_sums, launch)


def _given(weights):
    weight, bias, energy = weights
    return weight.contiguous(), floats(bias), floats(energy)
