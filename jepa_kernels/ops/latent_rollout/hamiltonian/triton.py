"""Triton backend of a Hamiltonian's rollout, plain products through torch.

All steps of the forward pass take one launch: a program keeps the hidden state of its rows in
registers and streams the matrices. The backward pass takes a launch for each half-step.
"""

from __future__ import annotations

import torch

from ..coupling import Coupling
from ..readout.triton import TritonReadout
from ..triton_launch import options, padded, tiles, triton_backend
from . import rollout
from .inputs import Inputs
from .rollout import Tensors, Weights, half_steps_backward

WIDEST = 256
BACKWARD_STAGES = 1  # loads ahead of their use would make it spill on 8.0


class Triton(TritonReadout):
    """See `rollout.Kernels`."""

    def recurrence(self, inputs: Inputs, a: torch.Tensor, coupling: Coupling) -> Tensors:
        from .triton_kernels import hamiltonian_fwd_kernel

        weight, bias, energy = _given(inputs)
        (rows, hidden), middle = a.shape, weight.shape[0]
        sums = a.new_empty((2, inputs.kept_steps, rows, hidden))
        saved = a.new_empty((2 * inputs.horizon, rows, hidden) if inputs.save else (0,))
        if rows:
            sizes = tiles(hidden, weight.dtype, middle)
            hamiltonian_fwd_kernel[(-(-rows // sizes["BM"]),)](
                a,
                weight,
                bias,
                energy,
                coupling.rounded(),
                sums,
                saved,
                weight.new_empty((rows, hidden)),
                weight.new_empty((rows, middle)),
                rows,
                inputs.horizon,
                hidden,
                middle,
                inputs.time_step,
                hidden,
                middle,
                KEEP=inputs.keeps_all,
                SAVE=inputs.save,
                BD=padded(middle),
                **sizes,
            )
        return saved, sums

    def recurrence_backward(
        self, inputs: Inputs, hidden: torch.Tensor, coupling: Coupling, grad_sums: torch.Tensor
    ) -> Tensors:
        from .triton_kernels import hamiltonian_bwd_kernel

        given, matrix = _given(inputs), coupling.rounded()
        (_, rows, width), weight, middle = hidden.shape, given[0], given[0].shape[0]
        force, energy_rows = hidden.new_empty((rows, width)), hidden.new_empty((rows, middle))
        left, right = hidden.new_empty((2, rows, middle)), hidden.new_empty((2, rows, width))
        scratch, scratch2 = weight.new_empty((rows, width)), weight.new_empty((rows, middle))
        sizes = tiles(width, weight.dtype, middle) | options(8, BACKWARD_STAGES)

        def launch(
            a: torch.Tensor,
            step: float,
            transposed: bool,
            moves: bool,
            following: torch.Tensor,
            carried: torch.Tensor,
        ) -> Tensors:
            if rows:
                hamiltonian_bwd_kernel[(-(-rows // sizes["BM"]),)](
                    a,
                    *given,
                    matrix,
                    following,
                    carried,
                    force,
                    left,
                    right,
                    energy_rows,
                    scratch,
                    scratch2,
                    rows,
                    width,
                    middle,
                    step,
                    width,
                    middle,
                    MOVES=moves,
                    TRANSPOSED=transposed,
                    BD=padded(middle),
                    **sizes,
                )
            return force, left, right, energy_rows

        return half_steps_backward(inputs, hidden, given, coupling, grad_sums, launch)


def _given(inputs: Inputs) -> Weights:
    weight, bias, energy = inputs.weights
    return weight.contiguous(), bias.float(), energy.float().contiguous()


BACKEND = triton_backend(rollout, Triton(), WIDEST)
