"""What a backend may look at to accept or refuse an ema_update call: dtypes, sizes, devices and
flags."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...checks import dtype_name

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "kahan", "stochastic")


@dataclass(frozen=True)
class Call:
    """One call as `resolve` sees it. `dtypes` are those of every tensor of every list, each
    once."""

    device_type: str
    dtype: torch.dtype
    dtypes: tuple[torch.dtype, ...]
    num_tensors: int
    num_elements: int
    rounding: str
    copies: bool

    def size_class(self) -> str:
        """``small`` below a million elements, where the cost of the call itself counts, else
        ``large``."""
        return "small" if self.num_elements < 1_000_000 else "large"

    def describe(self) -> str:
        dtypes = ", ".join(dtype_name(d) for d in self.dtypes)
        parts = [
            f"{self.num_tensors} tensors, {self.num_elements} elements, {dtypes} "
            f"{self.device_type}; rounding {self.rounding}"
        ]
        if self.copies:
            parts.append("with copies")
        return "; ".join(parts)


def dtype_reasons(dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Why a kernel backend cannot take these dtypes; empty when it can."""
    refused = [d for d in dtypes if d not in KERNEL_DTYPES]
    if not refused:
        return []
    allowed = " or ".join(dtype_name(d) for d in KERNEL_DTYPES)
    return [f"dtype must be {allowed}, got {', '.join(dtype_name(d) for d in refused)}"]
