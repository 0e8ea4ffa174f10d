"""Latent dynamics: a small head predicts how the target features of a site change over the next
time steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from jepa.objectives.base import (
    FeatureDims,
    Objective,
    ObjectiveConfig,
    ObjectiveContext,
    segment_softmax_weights,
    two_layer_head,
)
from jepa_kernels import ResidualMLP


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    hidden: int = 256
    """Hidden width of the head."""
    channels: Literal["all", "dynamics"] = "all"
    """What the head reads: all channels or the dynamics ones."""
    hard_region: bool = False
    """Weights pairs by a softmax of their errors."""
    temperature: float = 1.0
    """Of that softmax."""
    horizon: int = 1
    """Steps that are rolled out; 1 is the published loss."""

    @property
    def minimum_frames(self) -> int:
        return self.horizon + 1

    @property
    def pair_horizon(self) -> int:
        return self.horizon

    def build_head(self, dims: FeatureDims) -> nn.Sequential:
        """f: the features (or their dynamics channels) to the change of all of them."""
        return two_layer_head(
            dims.dynamics_width if self.channels == "dynamics" else dims.width,
            self.hidden,
            dims.width,
        )


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over pairs and channels of |z_k - z_0 - (h(t+k) - h(t))|, averaged over k =
    1..horizon.

    z_0 = Z(t), z_{k+1} = z_k + f(z_k), where f reads all channels or the dynamics share and moves
    all of them; horizon 1 is the published |f(Z(t)) - (h(t+1) - h(t))|. `hard_region` weights a
    pair by n softmax(e / temperature) over the n pairs of its sample.
    """
    seen = (
        ctx.factorisation.dynamics_ranges(ctx.context_tokens.shape[-1], ctx.levels)
        if cfg.channels == "dynamics"
        else None
    )
    cell = ResidualMLP.from_module(cast(nn.Sequential, ctx.heads["latent_dynamics"]), seen)
    errors = ctx.rollout_errors("latent_dynamics", cell, cfg.horizon, anchored=True)
    error = errors.mean(0)
    if cfg.hard_region:
        error = error * segment_softmax_weights(error, _segments(ctx), cfg.temperature)
    loss = ctx.pair_mean(error)
    if cfg.hard_region and ctx.published_behaviour.dynamics_hard_no_gradient:
        loss = loss.detach()
    return Objective(loss, ctx.step_metrics(errors))


def _segments(ctx: ObjectiveContext) -> Tensor:
    """Where each softmax group of the pairs begins: one group per sequence (pairs are ordered by
    sequence), or one per mask set."""
    masks = ctx.masks
    if ctx.published_behaviour.dynamics_hard_pooled:
        group, groups = masks.pair_set, masks.num_sets
    else:
        sample = torch.div(masks.pair_rows[:, 0], masks.num_tokens, rounding_mode="floor")
        group, groups = (
            masks.pair_set * masks.batch_size + sample,
            masks.num_sets * masks.batch_size,
        )
    edges = torch.arange(groups + 1, device=group.device)
    return torch.searchsorted(group.contiguous(), edges)
