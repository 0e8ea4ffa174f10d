"""Products of matrices as every op takes them: operands rounded to one dtype, sums in float32."""

from __future__ import annotations

import torch

from .. import native

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
