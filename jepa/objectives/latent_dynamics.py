"""Latent dynamics: a small head predicts how the target features of a site change over the next time steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from jepa.objectives.base import FeatureDims, Objective, ObjectiveConfig, ObjectiveContext, segment_softmax_weights, two_layer_head


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    hidden: int = 256
    channels: Literal["all", "dynamics"] = "all"
    hard_region: bool = False
    temperature: float = 1.0
    horizon: int = 1


def minimum_frames(cfg: Config) -> int:
    return cfg.horizon + 1


def build_head(dims: FeatureDims, cfg: Config) -> nn.Module:
    """f: the features (or their dynamics channels) to the change of all of them."""
    return two_layer_head(dims.dynamics_width if cfg.channels == "dynamics" else dims.width, cfg.hidden, dims.width)


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over pairs and channels of |z_k - z_0 - (h(t+k) - h(t))|, averaged over k = 1..horizon.

    z_0 = Z(t), z_{k+1} = z_k + f(z_k), where f reads all channels or the dynamics share and moves all of them; horizon 1 is the
    published |f(Z(t)) - (h(t+1) - h(t))|. `hard_region` weights a pair by n softmax(e / temperature) over the n pairs of its sample.
    """
    if cfg.horizon > ctx.masks.horizon:
        raise ValueError(f"latent_dynamics: horizon must be at most that of the mask pairs ({ctx.masks.horizon}), got {cfg.horizon}.")
    loss = _loss(ctx, cfg)
    return Objective(loss.detach() if cfg.hard_region and ctx.quirks.dynamics_hard_no_gradient else loss)


def _loss(ctx: ObjectiveContext, cfg: Config) -> Tensor:
    tokens, _ = ctx.pair_tokens
    rows = ctx.masks.pair_rows
    start = ctx.pair_targets[0]
    error = tokens.new_zeros(tokens.shape[0])
    for k, moved in enumerate(_moves(ctx, cfg, tokens), start=1):
        change = ctx.pair_target_change if k == 1 else ctx.target.index_select(0, rows[:, k]) - start
        error = error + (moved - change).abs().mean(-1)
    error = error / cfg.horizon
    if cfg.hard_region:
        error = error * segment_softmax_weights(error, _segments(ctx), cfg.temperature)
    return ctx.pair_mean(error)


def _moves(ctx: ObjectiveContext, cfg: Config, tokens: Tensor) -> list[Tensor]:
    """z_k - z_0 for k = 1..horizon.

    The state only ever moves inside the span of W2's columns, so the recurrence runs on the hidden pre-activation a:
    a' = a + (W1 W2) gelu(a) + W1 b2, and z_k - z_0 = W2 s_k + k b2 with s_k the sum of the gelu(a): one small product per step.
    """
    first, _, second = ctx.heads["latent_dynamics"]
    reads_share = cfg.channels == "dynamics"
    state = ctx.factorisation.dynamics(tokens, ctx.levels) if reads_share else tokens
    activation = first(state)
    moves, total = [], None
    for k in range(1, cfg.horizon + 1):
        hidden = functional.gelu(activation)
        total = hidden if total is None else total + hidden
        moves.append(functional.linear(total, second.weight, second.bias * k))
        if k < cfg.horizon:
            weight, bias = second.weight.t(), second.bias
            if reads_share:
                weight, bias = (ctx.factorisation.dynamics(part, ctx.levels) for part in (weight, bias))
            activation = activation + functional.linear(hidden, first.weight @ weight.t(), first.weight @ bias)
    return moves


def _segments(ctx: ObjectiveContext) -> Tensor:
    """Where each softmax group of the pairs begins: one group per sequence (pairs are ordered by sequence), or one per mask set."""
    masks = ctx.masks
    if ctx.quirks.dynamics_hard_pooled:
        group, groups = masks.pair_set, masks.num_sets
    else:
        sample = torch.div(masks.pair_rows[:, 0], masks.num_tokens, rounding_mode="floor")
        group, groups = masks.pair_set * masks.batch_size + sample, masks.num_sets * masks.batch_size
    edges = torch.arange(groups + 1, device=group.device)
    return torch.searchsorted(group.contiguous(), edges)
