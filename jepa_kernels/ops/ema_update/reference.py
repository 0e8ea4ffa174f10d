"""The specification of ema_update in eager PyTorch, one tensor at a time, in float32 (float64 for
float64 targets).

    target <- momentum * target + (1 - momentum) * source

evaluated as torch.lerp evaluates it, so that momentum 0 and 1 and source == target are exact.
"""

from __future__ import annotations

import torch

from . import stochastic
from .call import Call


def unsupported_reasons(call: Call) -> list[str]:
    return []


def forward(targets, sources, momentum, copies, compensations, streams, rounding, seed) -> None:
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        compensation = compensations[i] if rounding == "kahan" else None
        update(target, source, momentum, compensation, rounding, seed, streams[i])
        if copies:
            copies[i].copy_(target)


def update(target, source, momentum, compensation, rounding, seed, stream) -> None:
    """One target, in place. 16-bit targets are computed in float32 and rounded as `rounding`
    says."""
    work = torch.float64 if target.dtype == torch.float64 else torch.float32
    value, source = target.to(work), source.to(work)
    if target.dtype in (torch.float32, torch.float64):
        target.copy_(average(value, source, momentum))
    elif rounding == "kahan":
        # target + compensation is the running value; what target cannot hold of it stays in
        # compensation.
        new = average(value + compensation.to(work), source, momentum)
        target.copy_(new)
        compensation.copy_(new - target.to(work))
    elif rounding == "stochastic":
        new = average(value, source, momentum)
        bits = stochastic.random_bits(seed, stream, target.numel(), target.device)
        target.copy_(stochastic.round_bfloat16(new, bits))
    else:
        target.copy_(average(value, source, momentum))


def average(target: torch.Tensor, source: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
    """momentum * target + (1 - momentum) * source; both weights are rounded once, from the float64
    momentum."""
    momentum = momentum.to(target.device, torch.float64)
    keep, take = momentum.to(target.dtype), (1 - momentum).to(target.dtype)
    difference = source - target
    return torch.where(take < 0.5, target + take * difference, source - keep * difference)
