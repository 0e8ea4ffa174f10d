"""Fast eager composition: one _foreach call over all targets of a dtype that match their sources,
else one tensor at a time."""

from __future__ import annotations

import torch

from . import stochastic
from .call import Call


def unsupported_reasons(call: Call) -> list[str]:
    return []


def forward(targets, sources, momentum, copies, compensations, streams, rounding, seed) -> None:
    plain = [
        t.dtype == s.dtype and (rounding == "nearest" or t.dtype in (torch.float32, torch.float64))
        for t, s in zip(targets, sources, strict=True)
    ]
    matching = [(t, s) for t, s, same in zip(targets, sources, plain, strict=True) if same]
    if matching:
        _lerp(*map(list, zip(*matching, strict=True)), momentum)
    for i, same in enumerate(plain):
        if not same:
            compensation = compensations[i] if rounding == "kahan" else None
            _mixed(targets[i], sources[i], momentum, compensation, rounding, seed, streams[i])
    if copies:
        torch._foreach_copy_(copies, targets)


def _lerp(targets, sources, momentum) -> None:
    if momentum.device.type == "cpu":
        torch._foreach_lerp_(targets, sources, 1.0 - float(momentum))
        return
    # A weight on the device is never read back: difference, scale, add.
    difference = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(difference, (1.0 - momentum.double()).float())
    torch._foreach_add_(targets, difference)


def _mixed(target, source, momentum, compensation, rounding, seed, stream) -> None:
    work = torch.promote_types(target.dtype, torch.float32)
    value = target.to(work)
    keep_in_16_bits = target.dtype in (torch.bfloat16, torch.float16)
    if compensation is not None and keep_in_16_bits:
        value = value + compensation
    take = (1.0 - momentum.to(target.device, torch.float64)).to(work)
    value = torch.lerp(value, source.to(work), take)
    if rounding == "stochastic" and keep_in_16_bits:
        bits = stochastic.random_bits(seed, stream, target.numel(), target.device)
        value = stochastic.round_bfloat16(value, bits)
    target.copy_(value)
    if compensation is not None and keep_in_16_bits:
        compensation.copy_(value - target)
