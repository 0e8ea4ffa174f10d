"""The C++ kernels of a GRU, as `rollout.Kernels` asks for them."""

from __future__ import annotations

import torch

from .... import native
from .. import native_ops
from ..native_ops import floats
from .inputs import Inputs
from .rollout import GateGradients, with_action_products


class Native:
    """See `rollout.Kernels`."""

    def recurrence(
        self,
        inputs: Inputs,
        start: torch.Tensor,
        actions: torch.Tensor,
        keep_all: bool,
        save: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states, gates = native_ops.OPS.latent_rollout_gru_fwd(
            start, floats(actions), _given(inputs), inputs.epsilon, keep_all, save, native.isa()
        )
        return states, gates

    def recurrence_backward(
        self,
        inputs: Inputs,
        start: torch.Tensor,
        actions: torch.Tensor,
        states: torch.Tensor,
        gates: torch.Tensor,
        grad_states: torch.Tensor,
    ) -> GateGradients:
        grad_gates, grad_start, grad_norm, grad_actions, grad_small = (
            native_ops.OPS.latent_rollout_gru_bwd(
                start,
                floats(actions),
                states,
                gates,
                _given(inputs),
                inputs.epsilon,
                grad_states.contiguous(),
                inputs.keeps_all,
                native.isa(),
            )
        )
        norms = grad_norm[:, 0].sum(0), grad_norm[:, 1].sum(0)
        if grad_gates.shape[-1] == 4 * start.shape[1]:  # on a GPU
            return with_action_products(
                grad_gates, grad_start, *norms, actions, inputs.weight_input
            )
        return GateGradients([grad_gates], grad_start, grad_actions, grad_small.sum(0), *norms)


def _given(inputs: Inputs) -> list[torch.Tensor]:
    weights = inputs.weights
    return [*(w.contiguous() for w in weights[:2]), *(floats(w) for w in weights[2:])]
