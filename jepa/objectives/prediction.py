"""Prediction at the target tokens: mean |predicted - target|^r / r. The loss every variant has."""

from __future__ import annotations

from dataclasses import dataclass

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    pass


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over targets and channels of |z_pred - h|^r / r."""
    return Objective(ctx.target_mean(ctx.prediction_residual))
