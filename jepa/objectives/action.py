"""Action prediction: from a context feature, predict how the mean colour of its patch changes to
the next time step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from jepa.models.patches import patch_means
from jepa.objectives.base import (
    FeatureDims,
    Objective,
    ObjectiveConfig,
    ObjectiveContext,
    two_layer_head,
)

COLOURS = 3


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    hidden: int = 256
    channels: Literal["all", "dynamics"] = "all"

    @property
    def minimum_frames(self) -> int:
        return 2

    def build_head(self, dims: FeatureDims) -> nn.Module:
        """f: the features (or their dynamics channels) to three colour changes."""
        return two_layer_head(
            dims.dynamics_width if self.channels == "dynamics" else dims.width, self.hidden, COLOURS
        )


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over pairs and colours of |f(Z(t)) - (a(t+1) - a(t))|; a = mean of the clip
    over tubelet and patch."""
    tokens, _ = ctx.pair_tokens
    if cfg.channels == "dynamics":
        tokens = ctx.factorisation.dynamics(tokens, ctx.levels)
    residual = ctx.heads["action"](tokens) - _colour_change(ctx)
    return Objective(ctx.pair_mean(residual.abs().mean(-1)))


def _colour_change(ctx: ObjectiveContext) -> Tensor:
    if ctx.clips is None:
        raise ValueError("action: clips must be given, got None.")
    colours = patch_means(ctx.clips, ctx.tubelet_size, ctx.patch_size).to(ctx.context_tokens.dtype)
    rows = ctx.masks.pair_rows
    return colours.index_select(0, rows[:, 1]) - colours.index_select(0, rows[:, 0])
