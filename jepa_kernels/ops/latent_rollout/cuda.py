"""CUDA C++ backend: csrc/latent_rollout/cuda behind its C ABI, plain matrix products through
torch.

A block owns 16 rows and takes them through every step in one launch (the backward pass of a
Hamiltonian: a launch per half-step); its hidden state, or the state of a GRU, stays in shared
memory. So does a matrix that a launch reads more than once, wherever it fits what the device lends
to a block: 256 hidden units of a residual MLP in 16 bits on 227 KiB, 128 on 99 KiB. Other matrices
stream from the L2 cache through a ring of asynchronous copies, one for each warp, three or eight
tiles deep. Either way products are separated by one barrier of the block, and the bits of a result
are the same. 16-bit products run on tensor cores (mma.sync). A readout fuses the product with the
base, the bias and, for a loss, the reduction. No atomics, so results repeat.
"""

from __future__ import annotations

import torch

from ... import native
from . import composition
from .call import Call, dtype_reasons
from .native_kernels import NativeKernels
from .problem import LOW_PRECISION, Problem

SAVES_SIGNS = False

# Widths whose tiles of 16 rows fit 99 KiB of shared memory, the least that a supported device has,
# beside a short ring.
WIDEST = {"residual_mlp": 448, "hamiltonian": 448, "gru": 640}


def unsupported_reasons(call: Call) -> list[str]:
    reasons = native.cuda_unavailable_reasons(call.device_type)
    widest = WIDEST[call.cell]
    if max(call.hidden) > widest:
        reasons.append(
            f"hidden width of a {call.cell} must be at most {widest}, got {max(call.hidden)}"
        )
    return reasons + dtype_reasons(call, (torch.float32, *LOW_PRECISION))


def forward(problem: Problem) -> tuple[torch.Tensor, ...]:
    return composition.forward(problem, NativeKernels())


def backward(
    problem: Problem, grad_out: torch.Tensor, saved: tuple[torch.Tensor, ...], needs_targets: bool
) -> composition.Gradients:
    return composition.backward(problem, NativeKernels(), grad_out, saved, needs_targets)
