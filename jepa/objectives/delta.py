"""Temporal-difference matching: the context features should change over time as the target features
do."""

from __future__ import annotations

from dataclasses import dataclass

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    weight: float = 0.5

    @property
    def minimum_frames(self) -> int:
        return 2


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over pairs and channels of |(Z(t+1) - Z(t)) - (h(t+1) - h(t))|."""
    before, after = ctx.pair_tokens
    return Objective(ctx.pair_mean(((after - before) - ctx.pair_target_change).abs().mean(-1)))
