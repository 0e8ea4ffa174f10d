"""The C++ kernels of csrc/sliced_gaussianity, for CPU and CUDA tensors alike."""

from __future__ import annotations

from typing import Any

import torch

from ... import native
from ...backend import Backend, Reason
from .blocks import block_backend
from .inputs import Inputs, kernel_reasons

OPS: Any = torch.ops.jepa_kernels_native
MOST_POINTS = 65  # JK_MOST_KNOTS of params.h, and t = 0


class Native:
    """See `blocks.Kernels`."""

    def sums(self, projections: torch.Tensor, count: int, spacing: float) -> torch.Tensor:
        pieces: torch.Tensor = OPS.sliced_gaussianity_sums(
            projections, count, spacing, native.isa()
        )
        return pieces[0] if pieces.shape[0] == 1 else pieces.sum(0)

    def slope_(self, projections: torch.Tensor, coefficients: torch.Tensor, spacing: float) -> None:
        OPS.sliced_gaussianity_slope_(projections, coefficients, spacing, native.isa())


def native_reasons(inputs: Inputs) -> list[Reason]:
    """Why the kernels cannot run this call on any machine."""
    reasons = kernel_reasons(inputs)
    if inputs.points > MOST_POINTS:
        reasons.append(Reason(f"points must be at most {MOST_POINTS}, got {inputs.points}"))
    return reasons


def cpu_backend() -> Backend:
    def unsupported(inputs: Inputs) -> list[Reason]:
        return native.cpu_unavailable_reasons(inputs.device_type) + native_reasons(inputs)

    return block_backend("cpu", ("cpu",), unsupported, Native())


def cuda_backend() -> Backend:
    def unsupported(inputs: Inputs) -> list[Reason]:
        return native.cuda_unavailable_reasons(inputs.device_type) + native_reasons(inputs)

    return block_backend("cuda", ("cuda",), unsupported, Native())
