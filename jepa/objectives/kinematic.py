"""Kinematic smoothness of the target features over the whole clip. It trains something only where
the target is online.

With an EMA target nothing upstream of these features carries a gradient, so the loss is a metric
and no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    kind: Literal["velocity", "huber", "acceleration"] = "velocity"
    huber_delta: float = 0.1
    channel_share: float = 1.0

    @property
    def minimum_frames(self) -> int:
        return 3 if self.kind == "acceleration" else 2


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """Mean over tokens and the first floor(D * channel_share) channels of |v|, huber(v) or |v(t+1)
    - v(t)|, v = h(t+1) - h(t)."""
    steps, height, width = ctx.grid
    features = ctx.target_live.view(ctx.masks.batch_size, steps, height * width, -1)
    channels = math.floor(features.shape[-1] * cfg.channel_share)
    velocity = features[..., :channels].diff(dim=1)
    return Objective(_penalty(velocity, cfg).mean((1, 2, 3)).sum() / ctx.denominators.samples)


def _penalty(velocity: Tensor, cfg: Config) -> Tensor:
    if cfg.kind == "acceleration":
        return velocity.diff(dim=1).abs()
    if cfg.kind == "huber":
        return functional.huber_loss(
            velocity,
            velocity.new_zeros(()).expand_as(velocity),
            reduction="none",
            delta=cfg.huber_delta,
        )
    return velocity.abs()
