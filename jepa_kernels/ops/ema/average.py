"""The average of one tensor, as the specification writes it and as eager PyTorch computes it over
lists."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch

from . import stochastic

_EXACT = frozenset((torch.float32, torch.float64))
_dtype = attrgetter("dtype")


def update(
    target: torch.Tensor,
    source: torch.Tensor,
    momentum: torch.Tensor,
    compensation: torch.Tensor | None,
    rounding: str,
    seed: torch.Tensor | None,
    stream: int,
) -> None:
    """One target, in place. 16-bit targets are computed in float32 and rounded as `rounding`
    says."""
    work = torch.float64 if target.dtype == torch.float64 else torch.float32
    value, source = target.to(work), source.to(work)
    if target.dtype in (torch.float32, torch.float64):
        target.copy_(average(value, source, momentum))
    elif rounding == "kahan":
        # target + compensation is the running value; what target cannot hold of it stays in
        # compensation.
        assert compensation is not None  # check_given saw to it
        new = average(value + compensation.to(work), source, momentum)
        target.copy_(new)
        compensation.copy_(new - target.to(work))
    elif rounding == "stochastic":
        assert seed is not None  # check_given saw to it
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


def update_lists(
    targets: list[torch.Tensor],
    sources: list[torch.Tensor],
    momentum: torch.Tensor,
    copies: list[torch.Tensor],
    compensations: list[torch.Tensor],
    streams: Sequence[int],
    rounding: str,
    seed: torch.Tensor | None,
) -> None:
    """Every target by _foreach operations: one call over all that match their sources in dtype,
    else one tensor at a time."""
    dtypes = set(map(_dtype, targets))
    exact = rounding == "nearest" or dtypes <= _EXACT
    if exact and len(dtypes) == 1 and set(map(_dtype, sources)) == dtypes:
        _lerp(targets, sources, momentum)
    else:
        _by_dtype(targets, sources, momentum, compensations, streams, rounding, seed)
    if copies:
        torch._foreach_copy_(copies, targets)


def _by_dtype(
    targets: list[torch.Tensor],
    sources: list[torch.Tensor],
    momentum: torch.Tensor,
    compensations: list[torch.Tensor],
    streams: Sequence[int],
    rounding: str,
    seed: torch.Tensor | None,
) -> None:
    plain = [
        t.dtype == s.dtype and (rounding == "nearest" or t.dtype in _EXACT)
        for t, s in zip(targets, sources, strict=True)
    ]
    matching = [(t, s) for t, s, same in zip(targets, sources, plain, strict=True) if same]
    if matching:
        _lerp([t for t, _ in matching], [s for _, s in matching], momentum)
    for i, same in enumerate(plain):
        if not same:
            compensation = compensations[i] if rounding == "kahan" else None
            _mixed(targets[i], sources[i], momentum, compensation, rounding, seed, streams[i])


def _lerp(targets: list[torch.Tensor], sources: list[torch.Tensor], momentum: torch.Tensor) -> None:
    if momentum.device.type == "cpu":
        torch._foreach_lerp_(targets, sources, 1.0 - float(momentum))
        return
    # A weight on the device is never read back: difference, scale, add.
    difference = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(difference, (1.0 - momentum.double()).float())
    torch._foreach_add_(targets, difference)


def _mixed(
    target: torch.Tensor,
    source: torch.Tensor,
    momentum: torch.Tensor,
    compensation: torch.Tensor | None,
    rounding: str,
    seed: torch.Tensor | None,
    stream: int,
) -> None:
    work = torch.promote_types(target.dtype, torch.float32)
    value = target.to(work)
    keep_in_16_bits = target.dtype in (torch.bfloat16, torch.float16)
    if compensation is not None and keep_in_16_bits:
        value = value + compensation
    take = (1.0 - momentum.to(target.device, torch.float64)).to(work)
    value = torch.lerp(value, source.to(work), take)
    if rounding == "stochastic" and keep_in_16_bits:
        assert seed is not None  # check_given saw to it
        bits = stochastic.random_bits(seed, stream, target.numel(), target.device)
        value = stochastic.round_bfloat16(value, bits)
    target.copy_(value)
    if compensation is not None and keep_in_16_bits:
        compensation.copy_(value - target)
