"""Velocity gate: tokens whose target moves slowly should be constant over time; fast ones are left
alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    percentile: float = 0.5

    @property
    def minimum_frames(self) -> int:
        return 2


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over pairs and channels of gate * |Z(t+1) - Z(t)|; gate = [speed <= percentile
    of the frame's speeds].

    Gated-out pairs stay in the denominator. speed(t, site) = ||h(t+1) - h(t)||_2.
    """
    steps, height, width = ctx.grid
    features = ctx.target.detach().view(ctx.masks.batch_size, steps, height * width, -1)
    speed = torch.linalg.vector_norm(features.diff(dim=1), dim=-1)
    gate = (speed <= _quantile(speed, cfg.percentile)).to(speed.dtype)
    # Row b*N + t*HW + site of the padded gate is the pair's first token; the last time step has no
    # successor and no pair.
    padded = torch.nn.functional.pad(gate, (0, 0, 0, 1)).reshape(-1)
    kept = padded.index_select(0, ctx.masks.pair_rows[:, 0])
    before, after = ctx.pair_tokens
    return Objective(
        ctx.pair_mean(kept * (after - before).abs().mean(-1)), {"kept": ctx.pair_mean(kept)}
    )


def _quantile(values: Tensor, share: float) -> Tensor:
    """Linear-interpolation quantile over the last axis, keeping it; torch.quantile reads its
    argument back on a CPU."""
    ordered = values.sort(dim=-1).values
    position = share * (values.shape[-1] - 1)
    low = math.floor(position)
    high = min(low + 1, values.shape[-1] - 1)
    return torch.lerp(ordered[..., low : low + 1], ordered[..., high : high + 1], position - low)
