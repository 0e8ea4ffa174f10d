"""Sums over processes that are differentiated."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def sum_over_ranks(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of `value` over the processes of `group`; its gradient is the sum of their gradients.

    Every process must call it equally often. Where each process takes 1/processes of a loss of the
    sum, or gradients are averaged over processes as DDP and FSDP do, the gradients are right.
    """
    # torch declares `apply` without types.
    total: torch.Tensor = _SumOverRanks.apply(value, group)  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
