"""What a backend may look at to accept or refuse a masked_attention call: shapes, dtypes, devices
and flags."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...checks import dtype_name


@dataclass(frozen=True)
class Call:
    """One call as `resolve` sees it. Shapes are those of the tensors; None stands for an absent
    one."""

    device_type: str
    dtype: torch.dtype
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    packed: bool
    grid: tuple[int, int, int] | None
    layout: str | None
    needs_grad: bool
    return_lse: bool

    @property
    def heads(self) -> int:
        return self.query_shape[-2]

    @property
    def head_dim(self) -> int:
        return self.query_shape[-1]

    def size_class(self) -> str:
        """``short`` up to 512 keys a sequence (dense) or in all (packed), else ``long``."""
        return "short" if self.key_shape[-3] <= 512 else "long"

    def describe(self) -> str:
        parts = [
            f"query {list(self.query_shape)} {dtype_name(self.dtype)} {self.device_type}; key "
            f"{list(self.key_shape)}"
        ]
        parts.append("packed" if self.packed else "dense")
        parts.append("no RoPE" if self.grid is None else f"grid {self.grid} {self.layout}")
        if self.needs_grad:
            parts.append("gradients needed")
        return "; ".join(parts)


def head_dim_reasons(call: Call) -> list[str]:
    """The head widths every kernel backend takes."""
    head_dim = call.head_dim
    if head_dim % 8 or not 8 <= head_dim <= 128:
        return [f"head_dim must be a multiple of 8 from 8 to 128, got {head_dim}"]
    return []


def dtype_reasons(call: Call, allowed: tuple[torch.dtype, ...]) -> list[str]:
    if call.dtype not in allowed:
        return [
            f"dtype must be {' or '.join(dtype_name(d) for d in allowed)}, got "
            f"{dtype_name(call.dtype)}"
        ]
    return []
