"""C++ CPU backend: csrc/latent_rollout/cpu through the stable-ABI binding, plain matrix
products through torch.

Where the processor multiplies bfloat16 (AVX512_BF16), that is what products of such inputs read;
sums, states and what lies between two products are float32. Elsewhere, and for float16, inputs are
widened once: their products would lose speed and accuracy.
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
    return native.cpu_unavailable_reasons(call.device_type) + dtype_reasons(
        call, (torch.float32, *LOW_PRECISION)
    )


def forward(problem: Problem) -> tuple[torch.Tensor, ...]:
    out, *saved = composition.forward(
        composition.multiplied(problem), NativeKernels(native.isa(), keep_signs=True)
    )
    return out if problem.output == "errors" else out.to(problem.states.dtype), *saved


def backward(
    problem: Problem, grad_out: torch.Tensor, saved: tuple[torch.Tensor, ...], needs_targets: bool
) -> composition.Gradients:
    return composition.backward(
        composition.multiplied(problem),
        NativeKernels(native.isa(), keep_signs=True),
        grad_out,
        saved,
        needs_targets,
    )
