"""Hard-region weighting: the prediction loss again, with more weight where it is large."""

from __future__ import annotations

from dataclasses import dataclass

from jepa.objectives.base import (
    Objective,
    ObjectiveConfig,
    ObjectiveContext,
    segment_softmax_weights,
)


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    weight: float = 0.3
    temperature: float = 1.0
    """Of the softmax over a sample's errors; the smaller, the more the worst count."""


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean of w * e; e = the token's prediction error, w = P softmax(e / temperature)
    over the P targets of its sample."""
    error = ctx.prediction_residual
    weights = segment_softmax_weights(error, ctx.masks.target_cu, cfg.temperature)
    return Objective(ctx.target_mean(weights * error))
