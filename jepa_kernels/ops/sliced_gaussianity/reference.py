"""The specification: every angle of every row, direction and knot, and the formula of the paper."""

from __future__ import annotations

import torch

from ...backend import ANY_DEVICE, Backend, Reason
from .inputs import Inputs


def unsupported(inputs: Inputs) -> list[Reason]:
    return []


def compose(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    projections = (inputs.features @ inputs.directions).to(inputs.accumulate_dtype)
    time = torch.linspace(
        0.0,
        inputs.largest_point,
        inputs.points,
        dtype=projections.dtype,
        device=projections.device,
    )
    angle = projections[:, :, None] * time  # [N, S, K]
    cosine, sine = angle.cos().sum(0), angle.sin().sum(0)
    nothing = projections.new_empty(0)
    if inputs.output == "sums":
        return torch.stack((cosine, sine)).mT[:, 1:].contiguous(), nothing
    rows = inputs.rows
    normal = torch.exp(-0.5 * time.square())
    squared = (cosine / max(rows, 1) - normal).square() + (sine / max(rows, 1)).square()
    # From -T to T: the integrand is even.
    integral = 2.0 * torch.trapezoid(squared * normal, time)
    return rows * integral.mean(), nothing


BACKEND = Backend("reference", ANY_DEVICE, unsupported, compose=compose)
