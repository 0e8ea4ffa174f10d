"""The contract of visible_patch_embed: its backends in the order `auto` tries them, its schema, its
checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ... import checks
from ...contract import Function
from ...device_tables import DeviceTables, upload
from .inputs import NAME, Inputs, check, check_direct, check_values, example, outputs

PRIORITY = ("cuda", "triton", "cpu", "torch", "reference")
Statistics = Sequence[float] | torch.Tensor
_normalisations = DeviceTables(32)


def prepare(
    clip: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    scale: float | None = None,
) -> Inputs:
    """The checked inputs of the public function's arguments."""
    checks.is_tensor(NAME, "clip", clip)
    checks.is_tensor(NAME, "weight", weight)
    checks.has_rank(NAME, "clip", clip, 5, "[B, C, frames, height, width]")
    checks.has_rank(NAME, "weight", weight, 5, "[D, C, pt, ph, pw]")
    if ids is None:
        if cu_seqlens is not None:
            got = checks.type_name(cu_seqlens)
            raise ValueError(checks.sentence(NAME, "cu_seqlens", "be None without ids", got))
        sizes = zip(clip.shape[2:], weight.shape[2:], strict=True)
        frames, height, width = (size // max(side, 1) for size, side in sizes)
        ids = torch.arange(frames * height * width, device=clip.device)
    inputs = Inputs(
        clip,
        weight.contiguous() if weight.layout == torch.strided else weight,
        bias,
        _normalisation(clip, weight.dtype, mean, std, scale),
        ids,
        cu_seqlens,
    )
    check(inputs)
    return inputs


def _normalisation(
    clip: torch.Tensor,
    dtype: torch.dtype,
    mean: Statistics | None,
    std: Statistics | None,
    scale: float | None,
) -> torch.Tensor:
    """``[2, C]``: the gain and the shift that make ``(scale * x - mean) / std`` of a pixel x."""
    if scale is None:
        scale = 1.0 if clip.is_floating_point() else 1.0 / 255.0
    checks.is_finite_number(NAME, "scale", scale)
    channels, device = clip.shape[1], clip.device
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(mean, torch.Tensor) or isinstance(std, torch.Tensor):
        shift = _statistic("mean", mean, 0.0, channels, wide, device)
        spread = _statistic("std", std, 1.0, channels, wide, device)
        return torch.stack((scale / spread, -shift / spread))
    means, spreads = _numbers("mean", mean, 0.0, channels), _numbers("std", std, 1.0, channels)
    if 0.0 in spreads:
        raise ValueError(checks.sentence(NAME, "std", "not be 0", spreads))
    rows = (
        tuple(scale / s for s in spreads),
        tuple(-m / s for m, s in zip(means, spreads, strict=True)),
    )

    def build() -> torch.Tensor:
        return upload(torch.tensor(rows, dtype=wide, device="cpu"), device)

    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return torch.tensor(rows, dtype=wide, device=device)

    def lasting() -> tuple[torch.Tensor]:
        # Whatever mode the first call is in, later ones may be in another.
        with torch.inference_mode(False), torch.no_grad():
            return (build(),)

    return _normalisations.get((rows, wide, device), device, lasting)[0]


def _statistic(
    argument: str,
    value: Statistics | None,
    default: float,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return torch.tensor(
            _numbers(argument, value, default, channels), dtype=dtype, device=device
        )
    checks.has_dtype(NAME, argument, value, checks.FLOAT_DTYPES)
    checks.same_device(NAME, argument, value, device)
    if tuple(value.shape) != (channels,):
        wanted = f"have shape ({channels},), one number of each channel"
        raise ValueError(checks.sentence(NAME, argument, wanted, tuple(value.shape)))
    return value.detach().to(dtype)


def _numbers(argument: str, value: Any, default: float, channels: int) -> tuple[float, ...]:
    if value is None:
        return (default,) * channels
    if not isinstance(value, (list, tuple)):
        wanted = "be a sequence of numbers, a tensor or None"
        raise TypeError(checks.sentence(NAME, argument, wanted, checks.type_name(value)))
    for number in value:
        checks.is_finite_number(NAME, argument, number)
    if len(value) != channels:
        wanted = f"have {channels} numbers, one of each channel"
        raise ValueError(checks.sentence(NAME, argument, wanted, len(value)))
    return tuple(float(number) for number in value)


OP = Function(
    NAME,
    __package__,
    PRIORITY,
    prepare,
    {"many": example(512), "few": example(16)},
    inputs=Inputs,
    check=check,
    check_direct=check_direct,
    check_values=check_values,
    outputs=outputs,
    num_outputs=2,
    saved=(1,),
)
