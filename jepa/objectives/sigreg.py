"""SIGReg: random one-dimensional projections of the context features should look standard normal (LeJEPA, arXiv 2511.08544)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    slices: int = 1024
    points: int = 17
    largest_point: float = 3.0
    seed: int = 0


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """Mean over random directions a of M * sum_i w_i [(mean cos(t_i u) - phi_i)^2 + (mean sin(t_i u))^2], u = X a.

    X is all M context rows of this part of the batch; directions are drawn anew each step from (seed, step).
    """
    directions = projection(ctx.context_tokens, cfg.slices, cfg.seed + ctx.step)
    statistic = characteristic_distance(ctx.context_tokens @ directions, cfg.points, cfg.largest_point)
    return Objective(statistic / ctx.denominators.parts)


def projection(features: Tensor, slices: int, seed: int) -> Tensor:
    """[D, slices] unit columns, the same for every rank at a step."""
    generator = torch.Generator(device=features.device).manual_seed(seed)
    directions = torch.randn(features.shape[-1], slices, generator=generator, device=features.device, dtype=features.dtype)
    return directions / torch.linalg.vector_norm(directions, dim=0, keepdim=True)


def characteristic_distance(projected: Tensor, points: int, largest_point: float) -> Tensor:
    """Mean over the columns of [M, S] of the Epps-Pulley statistic against N(0, 1): trapezium rule on `points` points of [0, t_max]."""
    if points < 2:
        raise ValueError(f"sigreg: points must be at least 2, got {points}.")
    return _CharacteristicDistance.apply(projected, points, largest_point)


class _CharacteristicDistance(torch.autograd.Function):
    """The points are equally spaced, so cos and sin at point i + 1 follow from those at i and 1 by the addition theorem:

    two transcendental functions per entry instead of two per entry and point, and nothing of size [M, S, points] is ever stored.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, points: int, largest_point: float) -> Tensor:
        step = largest_point / (points - 1)
        time = torch.linspace(0.0, largest_point, points, device=projected.device, dtype=projected.dtype)
        normal = torch.exp(-0.5 * time.square())
        weight = normal * (2.0 * step)
        weight[0] *= 0.5
        weight[-1] *= 0.5
        cosines, sines = [], []
        for cosine, sine in _harmonics(projected, step, points - 1):
            cosines.append(cosine.mean(0))
            sines.append(sine.mean(0))
        gap = torch.stack(cosines) - normal[1:, None]
        mean_sine = torch.stack(sines)
        ctx.save_for_backward(projected, gap, mean_sine, time, weight)
        ctx.step = step
        rows, slices = projected.shape
        # The first point, t = 0, contributes nothing: cos = phi = 1 and sin = 0.
        return (weight[1:, None] * (gap.square() + mean_sine.square())).sum() * (rows / slices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        projected, gap, mean_sine, time, weight = ctx.saved_tensors
        coefficient = (2.0 / projected.shape[1]) * weight[1:, None] * time[1:, None]
        on_sine, on_cosine = coefficient * gap, coefficient * mean_sine
        result = torch.zeros_like(projected)
        for i, (cosine, sine) in enumerate(_harmonics(projected, ctx.step, len(gap))):
            result.addcmul_(cosine, on_cosine[i].expand_as(result)).addcmul_(sine, on_sine[i].expand_as(result), value=-1.0)
        return result.mul_(grad), None, None


def _harmonics(projected: Tensor, step: float, count: int) -> Any:
    """cos(k step u), sin(k step u) for k = 1..count, one after the other."""
    first_cosine, first_sine = (projected * step).cos(), (projected * step).sin()
    cosine, sine = first_cosine, first_sine
    for k in range(count):
        if k:
            cosine, sine = cosine * first_cosine - sine * first_sine, sine * first_cosine + cosine * first_sine
        yield cosine, sine
