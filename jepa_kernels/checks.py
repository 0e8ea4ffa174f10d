"""Argument checks with one wording: ``<op>: <argument> must <requirement>, got <value>.``

Everything here reads only shapes, dtypes, devices and flags, so it traces under torch.compile; the
functions that read values (`token_ids_in_grid`, `times_in_range`, `offsets_valid`) are called
inside ops, on CPU tensors always and on a GPU under JEPA_KERNELS_CHECK=1.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)


def sentence(op: str, argument: str, requirement: str, got: object, hint: str = "") -> str:
    """The one wording of every error this package raises about an argument."""
    return f"{op}: {argument} must {requirement}, got {got}." + (f" {hint}" if hint else "")


def type_name(value: object) -> str:
    return type(value).__name__


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_tensor(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(sentence(op, argument, "be a tensor", type_name(value)))


def is_bool(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(sentence(op, argument, "be a bool", type_name(value)))


def is_finite_number(op: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(sentence(op, argument, "be a number", type_name(value)))
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(sentence(op, argument, "be finite", value))


def has_dtype(
    op: str, argument: str, value: torch.Tensor, allowed: tuple[torch.dtype, ...]
) -> None:
    if value.dtype not in allowed:
        wanted = " or ".join(dtype_name(d) for d in allowed)
        raise ValueError(sentence(op, argument, f"have dtype {wanted}", dtype_name(value.dtype)))


def has_rank(op: str, argument: str, value: torch.Tensor, rank: int, meaning: str) -> None:
    if value.dim() != rank:
        raise ValueError(
            sentence(
                op, argument, f"have {rank} dimensions {meaning}", f"shape {tuple(value.shape)}"
            )
        )


def same_device(op: str, argument: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            sentence(op, argument, f"be on {device} like the first tensor", value.device)
        )


def is_strided(op: str, argument: str, value: torch.Tensor) -> None:
    if value.layout != torch.strided or value.is_quantized:
        raise ValueError(
            sentence(op, argument, "be a dense (strided) tensor", f"layout {value.layout}")
        )


def values_are_checked(tensor: torch.Tensor) -> bool:
    """True where reading values costs no device synchronisation, or the user asked for it
    (JEPA_KERNELS_CHECK=1)."""
    return tensor.device.type == "cpu" or os.environ.get("JEPA_KERNELS_CHECK") == "1"


def token_ids_in_grid(op: str, argument: str, ids: torch.Tensor, num_tokens: int) -> None:
    """Ids lie in [-1, num_tokens); -1 marks a token without a position (class and register
    tokens)."""
    if ids.numel() and values_are_checked(ids):
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < -1 or high >= num_tokens:
            got = low if low < -1 else high
            raise ValueError(sentence(op, argument, f"hold ids from -1 to {num_tokens - 1}", got))


def times_in_range(op: str, argument: str, times: torch.Tensor) -> None:
    """Times fit into 32 bits, whatever their dtype."""
    if times.dtype != torch.int32 and times.numel() and values_are_checked(times):
        low, high = (int(v) for v in torch.aminmax(times))
        if low < -(2**31) or high >= 2**31:
            got = low if low < -(2**31) else high
            raise ValueError(
                sentence(op, argument, f"hold times from {-(2**31)} to {2**31 - 1}", got)
            )


def offsets_valid(op: str, argument: str, offsets: torch.Tensor, total: int) -> None:
    """Offsets start at 0, never decrease and end at or before the last row."""
    if not values_are_checked(offsets):
        return
    values = offsets.tolist()
    if values[0] != 0:
        raise ValueError(sentence(op, argument, "start at 0", values[0]))
    for before, after in pairwise(values):
        if after < before:
            raise ValueError(sentence(op, argument, "never decrease", f"{after} after {before}"))
    if values[-1] > total:
        raise ValueError(sentence(op, argument, f"end at or before {total} rows", values[-1]))


def is_autocast_enabled(kind: str) -> bool:
    """Whether autocast is on for this device type. Devices without autocast, such as meta, refuse
    the question itself."""
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return False
    return torch.is_autocast_enabled(kind)


def under_autocast(kind: str, *values: Any) -> tuple[Any, ...]:
    """The arguments of a product as torch's autocast gives them to it: float tensors, but for
    float64, in its dtype, and what is no tensor as it is."""
    if not is_autocast_enabled(kind):
        return values
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        value.to(dtype)
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
        else value
        for value in values
    )
