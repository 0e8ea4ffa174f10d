"""What the backends compute alike: fresh tensors, rows of a table, powers of residuals."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import native


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor; a large one on a CPU in huge pages, where there are any
    (csrc/binding.h says why)."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and native.available():
        native.ops.advise_huge_pages(tensor)
    return tensor


def take(table: torch.Tensor, rows: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    """Channels start to stop of a table, of the given rows or of all."""
    table = table[:, start:stop]
    return table if rows is None else table.index_select(0, rows)


def inside(rows: torch.Tensor | None, table: torch.Tensor) -> torch.Tensor | None:
    """Row indices of `table` for a kernel that reads it directly. The op checks them on a CPU; a
    GPU would have to wait, so there they are clamped: a wrong index gives a wrong row, never memory
    outside of the table."""
    return (
        rows
        if rows is None or rows.device.type == "cpu"
        else rows.clamp(0, max(table.shape[-2] - 1, 0))
    )


def power_mean(residual: torch.Tensor, exponent: float) -> torch.Tensor:
    """mean over the last dimension of ``|residual| ** exponent / exponent``."""
    magnitude = residual.abs()
    return (magnitude if exponent == 1.0 else magnitude.pow(exponent) / exponent).mean(-1)


def power_mean_gradient(
    residual: torch.Tensor, grad: torch.Tensor, exponent: float
) -> torch.Tensor:
    """The gradient of `power_mean` to its residual, 0 where the residual is 0."""
    gradient = residual.sign() * (grad / residual.shape[-1])[..., None]
    return gradient if exponent == 1.0 else gradient * residual.abs().pow(exponent - 1)
