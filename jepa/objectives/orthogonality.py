"""Orthogonality (second half of the factorised world model): appearance and dynamics channels
should be uncorrelated."""

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
    """Rows that the covariance is of: one process's (published), or all processes'."""


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean of C^2, C = A^T G / (M - 1): A, G the centred appearance and dynamics channels
    of all M context rows of set j.

    Statistics are those of this part of the batch (published), or with scope "global" those of the
    micro-batch over all ranks; the parts are averaged.
    """
    squares = []
    for rows in ctx.context_tokens.split(ctx.masks.context_sizes):
        # Fewer than two rows have no covariance: such a set is left out. Over all ranks nobody may
        # stay away from the sum.
        if rows.shape[0] > 1 or cfg.scope == "global":
            parts = (
                part(rows, ctx.levels)
                for part in (ctx.factorisation.appearance, ctx.factorisation.dynamics)
            )
            squares.append((mean_square_covariance if cfg.scope == "rank" else _over_ranks)(*parts))
    if not squares:
        return Objective(ctx.context_tokens.sum() * 0.0)
    return Objective(torch.stack(squares).mean() / ctx.denominators.parts)


def mean_square_covariance(appearance: Tensor, dynamics: Tensor) -> Tensor:
    """The mean of C^2 for C = A^T G / (M - 1), A and G the centred inputs [M, a] and [M, g]."""
    rows, width, other = *appearance.shape, dynamics.shape[1]
    centred = appearance - appearance.mean(0)
    # |A^T G|^2 = sum of (A A^T)(G G^T), entry by entry: fewer products, backward included,
    # where there are few rows.
    if 2 * rows * (width + other) < 3 * width * other:
        dynamics = dynamics - dynamics.mean(0)
        total = (torch.mm(centred, centred.t()) * torch.mm(dynamics, dynamics.t())).sum()
        return total / ((rows - 1) ** 2 * width * other)
    # One centred factor is enough here: the other's mean multiplies a sum that is zero.
    return (torch.mm(centred.t(), dynamics) / (rows - 1)).square().mean()


def _over_ranks(appearance: Tensor, dynamics: Tensor) -> Tensor:
    """The same for the rows of all ranks."""
    count = sum_over_ranks(appearance.new_full((), float(appearance.shape[0])))
    centred = appearance - sum_over_ranks(appearance.sum(0)) / count.clamp(min=1.0)
    return (
        (sum_over_ranks(torch.mm(centred.t(), dynamics)) / (count - 1.0).clamp(min=1.0))
        .square()
        .mean()
    )
