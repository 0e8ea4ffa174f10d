"""Schedules as pure functions of the optimiser step, and the published parameter groups. Counts are
steps, never epochs.

The first optimiser step is step 1: a schedule's value at 0 is never used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ScheduleConfig:
    """The published values."""

    total_steps: int = 30_000
    """Optimiser steps of the whole run."""
    warmup_steps: int = 300
    """Steps over which the rate rises from `initial_rate` to `rate`."""
    initial_rate: float = 1e-4
    """Learning rate at step 0."""
    rate: float = 6e-4
    """Learning rate after the warm-up."""
    final_rate: float = 6e-4
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.04
    """Weight decay at the start."""
    final_weight_decay: float = 0.04
    """Weight decay at the end of the cosine."""
    momentum: float = 0.99925
    """m of target <- m * target + (1 - m) * online at the first step."""
    final_momentum: float = 0.99925
    """m at the last step, reached linearly."""
    decay_scale: float = 1.0
    """Stretches the cosines beyond the run (published as ipe_scale)."""

    def learning_rate(self, step: int) -> float:
        """Linear from `initial_rate` to `rate` over the warm-up, then a cosine to `final_rate`."""
        if step < self.warmup_steps:
            return self.initial_rate + (self.rate - self.initial_rate) * step / self.warmup_steps
        span = max(1.0, self.total_steps * self.decay_scale - self.warmup_steps)
        return cosine(self.rate, self.final_rate, (step - self.warmup_steps) / span)

    def decay(self, step: int) -> float:
        """A cosine from `weight_decay` to `final_weight_decay`."""
        return cosine(
            self.weight_decay,
            self.final_weight_decay,
            step / max(1.0, self.total_steps * self.decay_scale),
        )

    def ema_momentum(self, step: int) -> float:
        """Linear from `momentum`, which the first step uses, to `final_momentum`, and no
        further."""
        moved = self.momentum + (step - 1) * (self.final_momentum - self.momentum) / max(
            1.0, self.total_steps * self.decay_scale
        )
        low, high = sorted((self.momentum, self.final_momentum))
        return min(max(moved, low), high)


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from start to end, flat outside [0, 1]."""
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(
    modules: Mapping[str, nn.Module], extra: Iterable[nn.Module] = ()
) -> list[dict[str, Any]]:
    """The published optimiser groups: for each module, parameters that decay and parameters that do
    not.

    Biases and one-dimensional tensors do not decay; embeddings of shape [1, 1, width] do. The order
    is that of the published code: the decaying group of every module, then the other group of every
    module, then two groups for each of `extra` (heads).

    Args:
        modules: by name, in order.
        extra: modules that came later, such as heads.

    Returns:
        Groups for a torch optimiser; `decays` says which ones the weight-decay schedule is for.
    """
    groups = [
        _group(name, module, decays) for decays in (True, False) for name, module in modules.items()
    ]
    for index, module in enumerate(extra):
        groups += [_group(f"head{index}", module, decays) for decays in (True, False)]
    return [group for group in groups if group["params"]]


def _group(name: str, module: nn.Module, decays: bool) -> dict[str, Any]:
    chosen = [
        (key, value)
        for key, value in module.named_parameters()
        if _decays(key, value) == decays and value.requires_grad
    ]
    return {
        "name": f"{name}.{'decay' if decays else 'plain'}",
        "params": [value for _, value in chosen],
        "decays": decays,
    }


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not name.endswith("bias")


def set_rates(groups: Iterable[dict[str, Any]], rate: float, decay: float) -> None:
    """Writes the schedule's values into an optimiser's groups."""
    for group in groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)
        group["weight_decay"] = decay if group["decays"] else 0.0
