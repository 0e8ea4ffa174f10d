"""Orthogonality (second half of the factorised world model): appearance and dynamics channels should be uncorrelated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    weight: float = 0.01


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean of C^2, C = A^T G / (M - 1): A, G the centred appearance and dynamics channels of all M context rows of set j.

    Statistics are those of this part of the batch (rank, micro-batch); the parts are averaged.
    """
    appearance = ctx.factorisation.appearance(ctx.context_tokens, ctx.levels)
    dynamics = ctx.factorisation.dynamics(ctx.context_tokens, ctx.levels)
    total = ctx.context_tokens.new_zeros(())
    sets = ctx.context_tokens.new_zeros(())
    for j in range(ctx.masks.num_sets):
        member = (ctx.masks.context_set == j).to(total.dtype)[:, None]
        rows = member.sum()
        covariance = _covariance(appearance, dynamics, member, rows)
        total = total + covariance.square().mean()
        sets = sets + (rows > 1).to(total.dtype)
    return Objective(total / sets.clamp(min=1.0) / ctx.denominators.parts)


def _covariance(first: Tensor, second: Tensor, member: Tensor, rows: Tensor) -> Tensor:
    """Cross-covariance of the member rows; zero for fewer than two of them."""
    count = rows.clamp(min=1.0)
    centred = member * (first - (member * first).sum(0) / count)
    other = second - (member * second).sum(0) / count
    return torch.mm(centred.t(), other) / (rows - 1.0).clamp(min=1.0)
