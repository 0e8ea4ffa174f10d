"""What the backends compute alike: products with float32 accumulation, rows of a table, powers of
residuals."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import native

_EXACT = (torch.float32, torch.float64)


def matmul(a: torch.Tensor, b: torch.Tensor, operand: torch.dtype) -> torch.Tensor:
    """a @ b for matrices, operands rounded to `operand`, result float32 (float64 for float64).

    A CPU with bfloat16 products sums in float32 and rounds the result, as torch offers no other.
    """
    return _widened(_product(a, b, operand))


def add_matmul(
    total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, operand: torch.dtype
) -> torch.Tensor:
    """total + a @ b, in place where there is a total."""
    if total is None:
        return matmul(a, b, operand)
    if operand in _EXACT:
        return total.addmm_(a.to(operand), b.to(operand))
    return total.add_(_product(a, b, operand))


def matmul_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, operand: torch.dtype) -> None:
    """out = a @ b."""
    if operand in _EXACT:
        torch.mm(a.to(operand), b.to(operand), out=out)
    else:
        out.copy_(_product(a, b, operand))


def widened_on_cpus(dtype: torch.dtype) -> bool:
    """Whether inputs of this dtype are best widened to float32 on this machine's CPU."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not native.multiplies_bf16())


def affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, operand: torch.dtype
) -> torch.Tensor:
    """x @ weight.mT + bias, rounded as `matmul` does."""
    if operand not in _EXACT and (x.is_cuda or widened_on_cpus(operand)):
        return matmul(x, weight.mT, operand).add_(bias)
    return _widened(torch.addmm(bias.to(operand), x.to(operand), weight.to(operand).mT))


def _product(a: torch.Tensor, b: torch.Tensor, operand: torch.dtype) -> torch.Tensor:
    a, b = a.to(operand), b.to(operand)
    if a.is_cuda and operand not in _EXACT:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if widened_on_cpus(operand) else a @ b


def _widened(product: torch.Tensor) -> torch.Tensor:
    return product.float() if product.dtype == torch.bfloat16 else product


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
