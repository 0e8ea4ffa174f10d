"""Auxiliary objectives, one file each: a `Config` (an `ObjectiveConfig`) and `compute(ctx, cfg) ->
Objective`; the configuration key is the file name.

`ObjectiveConfig` also has what a `Config` may override: the head that holds the objective's own
parameters, the clip length below which it is skipped, and how far ahead it looks.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from jepa.config import ConfigError, from_dict, nearest
from jepa.objectives.base import (
    Denominators,
    Factorisation,
    FeatureDims,
    Objective,
    ObjectiveConfig,
    ObjectiveContext,
    WeightSchedule,
)
from jepa.objectives.context import published_factor
from jepa.published_behaviour import PublishedBehaviour

__all__ = [
    "Denominators",
    "Factorisation",
    "FeatureDims",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveContext",
    "WeightSchedule",
    "build_heads",
    "compute_all",
    "configurations",
    "get",
    "names",
    "parse_objectives",
    "weights",
]

Objectives = Mapping[str, ObjectiveConfig]


class ObjectiveModule(Protocol):
    """What a file of this folder has to define."""

    Config: type[ObjectiveConfig]

    def compute(self, ctx: ObjectiveContext, cfg: Any) -> Objective:
        """The objective of the features in `ctx`; `cfg` is one of the file's `Config`."""


@functools.cache
def names() -> tuple[str, ...]:
    """Every objective: the files of this folder, listed once (a step asks for modules by name)."""
    return tuple(
        sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name != "base")
    )


def get(name: str) -> ObjectiveModule:
    """The module of an objective.

    Raises:
        ConfigError: no file of that name.
    """
    if name not in names():
        raise ConfigError(f"config: unknown objective {name!r}; {nearest(name, names())}")
    return cast(ObjectiveModule, importlib.import_module(f"jepa.objectives.{name}"))


def configurations() -> dict[str, type[ObjectiveConfig]]:
    """The `Config` of every objective."""
    return {name: get(name).Config for name in names()}


def parse_objectives(value: Any, path: str) -> dict[str, ObjectiveConfig]:
    """``{name: {option: value}}`` with every options mapping turned into the objective's own
    `Config`."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: {path} must be a mapping of objectives, got {value!r}.")
    return {
        name: from_dict(get(name).Config, options or {}, f"{path}.{name}")
        for name, options in value.items()
    }


def weights(
    objectives: Objectives, step: int, progress: float, behaviour: PublishedBehaviour
) -> dict[str, float]:
    """The weight of every objective at a moment of training: numbers on the host, so that weight 0
    can skip the work."""
    result = {}
    for name, cfg in objectives.items():
        factor = cfg.schedule.factor(progress)
        if name == "context" and behaviour.context_ramp_fixed_steps:
            factor = published_factor(step)
        result[name] = cfg.weight * factor
    return result


def build_heads(objectives: Objectives, dims: FeatureDims) -> nn.ModuleDict:
    """The heads of the objectives that have one, by objective name; weight 0 builds none."""
    heads = nn.ModuleDict()
    for name, cfg in objectives.items():
        head = cfg.build_head(dims) if cfg.weight != 0.0 else None
        if head is not None:
            heads[name] = head
    return heads


def compute_all(
    ctx: ObjectiveContext, objectives: Objectives, weight: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the objectives and the unweighted value of each.

    Args:
        ctx: the features.
        objectives: configurations by name.
        weight: current weights by name; 0 skips the objective entirely.

    Returns:
        The loss (a scalar) and metrics: ``<name>`` the unweighted value, ``<name>/<metric>`` its
        own metrics, and ``<name>/skipped``, which adds up to 1 where the clip has fewer time steps
        than the objective needs.
    """
    loss = ctx.predicted_tokens.new_zeros(())
    metrics: dict[str, Tensor] = {}
    for name, cfg in objectives.items():
        if weight[name] == 0.0:
            continue
        if cfg.minimum_frames > 1:
            skipped = ctx.grid[0] < cfg.minimum_frames
            metrics[f"{name}/skipped"] = torch.full(
                (), skipped / ctx.denominators.parts, device=loss.device
            )
            if skipped:
                continue
        result = get(name).compute(ctx, cfg)
        loss = loss + weight[name] * result.loss
        metrics[name] = result.loss.detach()
        metrics.update({f"{name}/{key}": value.detach() for key, value in result.metrics.items()})
    return loss, metrics
