"""C++ CPU backend: csrc/latent_rollout/cpu.cpp through the stable-ABI binding, plain matrix products through torch.

float32 inside: 16-bit inputs are widened once, which on a CPU costs less than what their products would lose in speed and accuracy.
"""

from __future__ import annotations

import torch

from ... import native
from . import composition
from .call import Call, dtype_reasons
from .native_kernels import NativeKernels
from .problem import LOW_PRECISION, Problem

SAVES_SIGNS = True


def unsupported_reasons(call: Call) -> list[str]:
    return native.cpu_unavailable_reasons(call.device_type) + dtype_reasons(call, (torch.float32, *LOW_PRECISION))


def forward(problem: Problem) -> tuple[torch.Tensor, ...]:
    out, *saved = composition.forward(_widened(problem), NativeKernels(native.isa(), keep_signs=True))
    return out if problem.output == "errors" else out.to(problem.states.dtype), *saved


def backward(problem: Problem, grad_out: torch.Tensor, saved: tuple[torch.Tensor, ...], needs_targets: bool) -> composition.Gradients:
    return composition.backward(_widened(problem), NativeKernels(native.isa(), keep_signs=True), grad_out, saved, needs_targets)


def _widened(problem: Problem) -> Problem:
    return problem.upcast() if problem.states.dtype in LOW_PRECISION else problem
