"""Static appearance (first half of the factorised world model): the appearance channels should not
change over time."""

from __future__ import annotations

from dataclasses import dataclass

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    weight: float = 0.05

    @property
    def minimum_frames(self) -> int:
        return 2


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over pairs and appearance channels of |Z(t+1) - Z(t)|."""
    before, after = ctx.pair_tokens
    change = ctx.factorisation.appearance(after - before, ctx.levels)
    return Objective(ctx.pair_mean(change.abs().mean(-1)))
