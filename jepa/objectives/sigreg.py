"""SIGReg: random one-dimensional projections of the context features should look standard normal
(LeJEPA, arXiv 2511.08544)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import jepa_kernels
from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext, all_ranks


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    slices: int = 1024
    """Random directions per step."""
    points: int = 17
    """Points of the characteristic function, 0 included."""
    largest_point: float = 3.0
    """The largest of them."""
    seed: int = 0
    """Of the directions, together with the step."""
    scope: Literal["rank", "global"] = "rank"
    """Rows that the statistic is of: one process's (published), or all processes'."""


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """`jepa_kernels.sliced_gaussianity` of the context features.

    Rows are all M context rows of this part of the batch (published), or with scope "global" those
    of the micro-batch over all ranks. Directions are drawn anew each step from (seed, step), the
    same on every rank.
    """
    statistic = jepa_kernels.sliced_gaussianity(
        ctx.context_tokens,
        projection(ctx.context_tokens, cfg.slices, cfg.seed + ctx.step),
        points=cfg.points,
        largest_point=cfg.largest_point,
        group=all_ranks() if cfg.scope == "global" else None,
    )
    return Objective(statistic / ctx.denominators.parts)


def projection(features: Tensor, slices: int, seed: int) -> Tensor:
    """[D, slices] unit columns, the same for every rank at a step and, up to rounding, for every
    dtype of the features."""
    generator = torch.Generator(device=features.device).manual_seed(seed)
    directions = torch.randn(
        features.shape[-1],
        slices,
        generator=generator,
        device=features.device,
        dtype=torch.float32,
    ).to(features.dtype)
    # A sum of squares down the columns runs along rows in memory; vector_norm over that axis takes
    # 15 times as long on a CPU.
    return directions.div_(directions.square().sum(0).sqrt_())
