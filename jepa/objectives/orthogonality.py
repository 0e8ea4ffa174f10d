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
    squares = []
    for rows in ctx.context_tokens.split(ctx.masks.context_sizes):
        # Fewer than two rows have no covariance: such a set is left out.
        if rows.shape[0] > 1:
            squares.append(_covariance(rows, ctx).square().mean())
    if not squares:
        return Objective(ctx.context_tokens.sum() * 0.0)
    return Objective(torch.stack(squares).mean() / ctx.denominators.parts)


def _covariance(rows: Tensor, ctx: ObjectiveContext) -> Tensor:
    appearance = ctx.factorisation.appearance(rows, ctx.levels)
    dynamics = ctx.factorisation.dynamics(rows, ctx.levels)
    # One centred factor is enough: the other's mean multiplies a sum that is zero.
    centred = appearance - appearance.mean(0)
    return torch.mm(centred.t(), dynamics) / (rows.shape[0] - 1)
