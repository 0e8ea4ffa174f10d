"""The specification of ema_update in eager PyTorch, one tensor at a time, in float32 (float64 for
float64 targets).

    target <- momentum * target + (1 - momentum) * source

evaluated as torch.lerp evaluates it, so that momentum 0 and 1 and source == target are exact.
"""

from __future__ import annotations

from ...backend import ANY_DEVICE, Backend, Reason
from ..ema.average import update
from .inputs import Inputs


def unsupported(inputs: Inputs) -> list[Reason]:
    return []


def forward(inputs: Inputs) -> None:
    kahan = inputs.rounding == "kahan"
    for i, (target, source, stream) in enumerate(
        zip(inputs.targets, inputs.sources, inputs.streams, strict=True)
    ):
        compensation = inputs.compensations[i] if kahan else None
        update(target, source, inputs.momentum, compensation, inputs.rounding, inputs.seed, stream)
        if inputs.copies:
            inputs.copies[i].copy_(target)


BACKEND = Backend("reference", ANY_DEVICE, unsupported, forward)
