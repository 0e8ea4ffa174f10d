"""What a backend may look at to accept or refuse an adamw_ema call: dtypes, sizes, devices and
flags."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...checks import dtype_name


@dataclass(frozen=True)
class Call:
    """One call as `resolve` sees it. `dtypes` are those of every tensor of every list, each
    once."""

    device_type: str
    dtype: torch.dtype
    dtypes: tuple[torch.dtype, ...]
    num_tensors: int
    num_targets: int
    num_elements: int
    rounding: str

    def size_class(self) -> str:
        """``small`` below a million elements, where the cost of the call itself counts, else
        ``large``."""
        return "small" if self.num_elements < 1_000_000 else "large"

    def describe(self) -> str:
        dtypes = ", ".join(dtype_name(d) for d in self.dtypes)
        return (
            f"{self.num_tensors} parameters, {self.num_targets} with a teacher, "
            f"{self.num_elements} elements, {dtypes} {self.device_type}; "
            f"rounding {self.rounding}"
        )
