"""What launches over lists of tensors share: places by dtype, and scalars where the kernel wants
them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def by_dtypes(*lists: Sequence[torch.Tensor | None]) -> list[list[int]]:
    """Places of the entries of each combination of dtypes."""
    places: dict[tuple[torch.dtype | None, ...], list[int]] = {}
    for i, entry in enumerate(zip(*lists, strict=True)):
        places.setdefault(tuple(None if t is None else t.dtype for t in entry), []).append(i)
    return list(places.values())


def dtype_of(tensor: torch.Tensor | None) -> Any:
    """The Triton type of a tensor's elements."""
    import triton.language as tl

    return (
        None
        if tensor is None
        else {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
            tensor.dtype
        ]
    )


def weights(
    momentum: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor | None, float, float]:
    """Both weights of the average: by value for a momentum on the host, as a pointer for one on the
    device."""
    if momentum.device.type == "cpu" and device.type != "cpu":
        return None, float(momentum), 1.0 - float(momentum)
    return torch.stack((momentum, 1.0 - momentum)).to(torch.float32), 0.0, 0.0


def on_the_device(scalar: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A 0-d tensor on `device`; one from the host travels as a kernel argument, so nothing
    waits."""
    if scalar.device == device:
        return scalar
    return torch.full((), scalar.item(), dtype=scalar.dtype, device=device)
