"""SIGReg: random one-dimensional projections of the context features should look standard normal (LeJEPA, arXiv 2511.08544)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext, sum_over_ranks


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    slices: int = 1024
    points: int = 17
    largest_point: float = 3.0
    seed: int = 0
    scope: Literal["rank", "global"] = "rank"


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """Mean over random directions a of M * sum_i w_i [(mean cos(t_i u) - phi_i)^2 + (mean sin(t_i u))^2], u = X a.

    X is all M context rows of this part of the batch (published), or with scope "global" those of the micro-batch over all ranks.
    Directions are drawn anew each step from (seed, step), the same on every rank.
    """
    directions = projection(ctx.context_tokens, cfg.slices, cfg.seed + ctx.step)
    statistic = characteristic_distance(ctx.context_tokens @ directions, cfg.points, cfg.largest_point, cfg.scope == "global")
    return Objective(statistic / ctx.denominators.parts)


def projection(features: Tensor, slices: int, seed: int) -> Tensor:
    """[D, slices] unit columns, the same for every rank at a step."""
    generator = torch.Generator(device=features.device).manual_seed(seed)
    directions = torch.randn(features.shape[-1], slices, generator=generator, device=features.device, dtype=features.dtype)
    return directions / torch.linalg.vector_norm(directions, dim=0, keepdim=True)


def characteristic_distance(projected: Tensor, points: int, largest_point: float, over_ranks: bool = False) -> Tensor:
    """Mean over the columns of [M, S] of the Epps-Pulley statistic against N(0, 1): trapezium rule on `points` points of [0, t_max]."""
    if points < 2:
        raise ValueError(f"sigreg: points must be at least 2, got {points}.")
    step = largest_point / (points - 1)
    # The point t = 0 is left out: cos = phi = 1 and sin = 0 there, whatever the data.
    time = torch.linspace(step, largest_point, points - 1, device=projected.device, dtype=projected.dtype)
    normal = torch.exp(-0.5 * time.square())
    weight = normal * (2.0 * step)
    weight[-1] *= 0.5
    sums = _HarmonicSums.apply(projected, points - 1, step)
    rows = projected.new_full((), float(projected.shape[0]))
    if over_ranks:
        sums, rows = sum_over_ranks(sums), sum_over_ranks(rows)
    cosine, sine = (sums / rows.clamp(min=1.0)).unbind()
    return rows * (weight[:, None] * ((cosine - normal[:, None]).square() + sine.square())).sum(0).mean()


class _HarmonicSums(torch.autograd.Function):
    """Sums over the rows of cos(k step u) and sin(k step u), k = 1..count: [2, count, S].

    The points are equally spaced, so both at k + 1 follow from those at k and 1 by the addition theorem: two transcendental functions
    per entry instead of two per entry and point, and nothing of size [M, S, count] is ever stored.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, count: int, step: float) -> Tensor:
        ctx.save_for_backward(projected)
        ctx.step = step
        sums = [(cosine.sum(0), sine.sum(0)) for cosine, sine in _harmonics(projected, step, count)]
        return torch.stack([torch.stack(part) for part in zip(*sums, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (projected,) = ctx.saved_tensors
        on_cosine, on_sine = grad.unbind()
        result = torch.zeros_like(projected)
        for k, (cosine, sine) in enumerate(_harmonics(projected, ctx.step, grad.shape[1])):
            time = (k + 1) * ctx.step
            result.addcmul_(cosine, on_sine[k], value=time).addcmul_(sine, on_cosine[k], value=-time)
        return result, None, None


def _harmonics(projected: Tensor, step: float, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """cos(k step u), sin(k step u) for k = 1..count, one after the other."""
    first_cosine, first_sine = (projected * step).cos(), (projected * step).sin()
    cosine, sine = first_cosine, first_sine
    for k in range(count):
        if k:
            cosine, sine = cosine * first_cosine - sine * first_sine, sine * first_cosine + cosine * first_sine
        yield cosine, sine
