"""Prediction at the context tokens, weighted by closeness to the targets: the V-JEPA 2.1 context
loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext, WeightSchedule


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    weight: float = 0.5
    # Over the second half of training; the published steps 15,000 to 30,000 of 30,000 are the same
    # share.
    schedule: WeightSchedule = field(default_factory=lambda: WeightSchedule("ramp", 0.5, 1.0))
    weight_by_distance: bool = True
    """Divides a token's error by the root of its distance to the nearest target."""


PUBLISHED_RAMP = (15_000, 30_000)


def published_factor(step: int) -> float:
    """The ramp of the published code, in steps."""
    begin, end = PUBLISHED_RAMP
    return WeightSchedule("ramp", 0.0, 1.0).factor((step - begin) / (end - begin))


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over context tokens and channels of |z_context - h|^r / (r * distance);
    distance = sqrt(nearest target)."""
    if ctx.predicted_context is None:
        raise ValueError(
            "context: predicted_context must be given when the weight is not 0, got None."
        )
    residual = ctx.power(ctx.predicted_context - ctx.target_context).mean(-1)
    if cfg.weight_by_distance:
        residual = residual / ctx.masks.context_distance
    return Objective(ctx.context_mean(residual))
