"""The C++ kernels of csrc/latent_rollout, for CPU and CUDA tensors alike: matrices that multiply
and tables keep the dtype of the states, everything else is float32.

A CPU that multiplies bfloat16 (AVX512_BF16) reads it in products; sums, states and what lies
between two products are float32. Elsewhere, and for float16, inputs are widened once: their
products would lose speed and accuracy.
"""

from __future__ import annotations

from typing import Any, overload

import torch

from ... import native
from ...backend import Backend, Reason
from .kernel_backend import KernelsT, Passes, RolloutT, kernel_backend
from .rollout import Rollout

OPS: Any = native.ops


@overload
def floats(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def floats(tensor: None) -> None: ...
def floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """What is no matrix of a product, as kernels read it."""
    return None if tensor is None else tensor.float().contiguous()


def cpu_backend(rollout: Passes[RolloutT, KernelsT], kernels: KernelsT) -> Backend:
    def unsupported(inputs: Rollout) -> list[Reason]:
        return native.cpu_unavailable_reasons(inputs.device_type) + inputs.kernel_reasons()

    return kernel_backend("cpu", ("cpu",), unsupported, rollout, kernels, widens=True)


def cuda_backend(rollout: Passes[RolloutT, KernelsT], kernels: KernelsT, widest: int) -> Backend:
    """`widest`: the width whose tiles of 16 rows fit 99 KiB of shared memory, the least that a
    supported device has, beside a short ring."""

    def unsupported(inputs: Rollout) -> list[Reason]:
        return native.cuda_unavailable_reasons(inputs.device_type) + inputs.kernel_reasons(widest)

    return kernel_backend("cuda", ("cuda",), unsupported, rollout, kernels)
