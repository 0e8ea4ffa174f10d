"""Orthogonality (second half of the factorised world model): appearance and dynamics channels should be uncorrelated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext, sum_over_ranks


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    weight: float = 0.01
    scope: Literal["rank", "global"] = "rank"


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean of C^2, C = A^T G / (M - 1): A, G the centred appearance and dynamics channels of all M context rows of set j.

    Statistics are those of this part of the batch (published), or with scope "global" those of the micro-batch over all ranks; the
    parts are averaged.
    """
    squares = []
    for rows in ctx.context_tokens.split(ctx.masks.context_sizes):
        # Fewer than two rows have no covariance: such a set is left out. Over all ranks nobody may stay away from the sum.
        if rows.shape[0] > 1 or cfg.scope == "global":
            squares.append(_covariance(rows, ctx, cfg).square().mean())
    if not squares:
        return Objective(ctx.context_tokens.sum() * 0.0)
    return Objective(torch.stack(squares).mean() / ctx.denominators.parts)


def _covariance(rows: Tensor, ctx: ObjectiveContext, cfg: Config) -> Tensor:
    appearance = ctx.factorisation.appearance(rows, ctx.levels)
    dynamics = ctx.factorisation.dynamics(rows, ctx.levels)
    # One centred factor is enough: the other's mean multiplies a sum that is zero.
    if cfg.scope == "rank":
        return torch.mm((appearance - appearance.mean(0)).t(), dynamics) / (rows.shape[0] - 1)
    count = sum_over_ranks(rows.new_full((), float(rows.shape[0])))
    centred = appearance - sum_over_ranks(appearance.sum(0)) / count.clamp(min=1.0)
    return sum_over_ranks(torch.mm(centred.t(), dynamics)) / (count - 1.0).clamp(min=1.0)
