"""Matrix products with float32 accumulation: on 16-bit operands where the processor multiplies those fast, else on float32."""

from __future__ import annotations

import torch


def matmul(a: torch.Tensor, b: torch.Tensor, operand: torch.dtype) -> torch.Tensor:
    """a @ b for matrices, operands rounded to `operand`, result float32 (float64 for float64)."""
    if operand in (torch.float32, torch.float64):
        return a.to(operand) @ b.to(operand)
    if a.is_cuda:
        return torch.mm(a.to(operand), b.to(operand), out_dtype=torch.float32)
    return a.to(operand).float() @ b.to(operand).float()


def add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, operand: torch.dtype) -> None:
    """total += a @ b in place."""
    if operand in (torch.float32, torch.float64):
        total.addmm_(a.to(operand), b.to(operand))
    else:
        total += matmul(a, b, operand)
