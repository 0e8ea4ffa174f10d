"""Latent temporal contrastive: a context feature should be closer to its own time's target than to
the next one's."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn import functional

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    weight: float = 0.5
    margin: float = 0.5

    @property
    def minimum_frames(self) -> int:
        return 2


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over pairs of max(0, margin - cos(Z(t), h(t)) + cos(Z(t), h(t+1)))."""
    tokens, _ = ctx.pair_tokens
    present, following = ctx.pair_targets
    own = functional.cosine_similarity(tokens, present, dim=-1)
    other = functional.cosine_similarity(tokens, following, dim=-1)
    return Objective(ctx.pair_mean((cfg.margin - own + other).clamp(min=0.0)))
