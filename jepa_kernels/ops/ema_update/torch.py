"""Fast eager composition: one _foreach call over all targets of a dtype that match their sources,
else one tensor at a time."""

from __future__ import annotations

from ...backend import ANY_DEVICE, Backend, Reason
from ..ema.average import update_lists
from .inputs import Inputs


def unsupported(inputs: Inputs) -> list[Reason]:
    return []


def forward(inputs: Inputs) -> None:
    update_lists(
        inputs.targets,
        inputs.sources,
        inputs.momentum,
        inputs.copies,
        inputs.compensations,
        inputs.streams,
        inputs.rounding,
        inputs.seed,
    )


BACKEND = Backend("torch", ANY_DEVICE, unsupported, forward)
