"""SIGReg: random one-dimensional projections of the context features should look standard normal
(LeJEPA, arXiv 2511.08544)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext, sum_over_ranks


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    slices: int = 1024
    """Random directions per step."""
    points: int = 17
    """Points of the characteristic function, 0 included."""
    largest_point: float = 3.0
    """The largest of them."""
    seed: int = 0
    """Of the directions, together with the step."""
    scope: Literal["rank", "global"] = "rank"
    """Rows that the statistic is of: one process's (published), or all processes'."""


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """Mean over random directions a of M * sum_i w_i [(mean cos(t_i u) - phi_i)^2 + (mean sin(t_i
    u))^2], u = X a.

    X is all M context rows of this part of the batch (published), or with scope "global" those of
    the micro-batch over all ranks. Directions are drawn anew each step from (seed, step), the same
    on every rank.
    """
    directions = projection(ctx.context_tokens, cfg.slices, cfg.seed + ctx.step)
    statistic = characteristic_distance(
        ctx.context_tokens @ directions, cfg.points, cfg.largest_point, cfg.scope == "global"
    )
    return Objective(statistic / ctx.denominators.parts)


def projection(features: Tensor, slices: int, seed: int) -> Tensor:
    """[D, slices] unit columns, the same for every rank at a step and, up to rounding, for every
    dtype of the features."""
    generator = torch.Generator(device=features.device).manual_seed(seed)
    directions = torch.randn(
        features.shape[-1],
        slices,
        generator=generator,
        device=features.device,
        dtype=torch.float32,
    ).to(features.dtype)
    # A sum of squares down the columns runs along rows in memory; vector_norm over that axis takes
    # 15 times as long on a CPU.
    return directions.div_(directions.square().sum(0).sqrt_())


def characteristic_distance(
    projected: Tensor, points: int, largest_point: float, over_ranks: bool = False
) -> Tensor:
    """Mean over the columns of [M, S] of the Epps-Pulley statistic against N(0, 1): trapezium rule
    on `points` points of [0, t_max]."""
    if points < 2:
        raise ValueError(f"sigreg: points must be at least 2, got {points}.")
    step = largest_point / (points - 1)
    # The point t = 0 is left out: cos = phi = 1 and sin = 0 there, whatever the data.
    time = torch.linspace(
        step, largest_point, points - 1, device=projected.device, dtype=projected.dtype
    )
    normal = torch.exp(-0.5 * time.square())
    weight = normal * (2.0 * step)
    weight[-1] *= 0.5
    # torch declares `apply` without types.
    sums: Tensor = _HarmonicSums.apply(projected, points - 1, step)  # type: ignore[no-untyped-call]
    rows = projected.new_full((), float(projected.shape[0]))
    if over_ranks:
        sums, rows = sum_over_ranks(sums), sum_over_ranks(rows)
    cosine, sine = (sums / rows.clamp(min=1.0)).unbind()
    distance: Tensor = weight[:, None] * ((cosine - normal[:, None]).square() + sine.square())
    return rows * distance.sum(0).mean()


class _HarmonicSums(torch.autograd.Function):
    """Sums over the rows of cos(k step u) and sin(k step u), k = 1..count: [2, count, S].

    The points are equally spaced, so these are real and imaginary part of the powers of z = exp(i
    step u): two transcendental functions per entry instead of two per entry and point, one product
    in place per power, and nothing of size [M, S, count] is ever stored.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, count: int, step: float) -> Tensor:
        angle = projected * step
        # Two real functions and a copy: torch.polar does the same in three times the time.
        first = torch.complex(angle.cos(), angle.sin_())
        ctx.save_for_backward(first)
        ctx.step = step
        power, sums = first.clone(), [first.sum(0)]
        for _ in range(count - 1):
            sums.append(power.mul_(first).sum(0))
        total = torch.stack(sums)
        return torch.stack((total.real, total.imag))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # d/du = sum_k t_k (g_sin cos(t_k u) - g_cos sin(t_k u)) = Re sum_k t_k (g_sin + i g_cos)
        # z^k, by Horner's rule.
        (first,) = ctx.saved_tensors
        count = grad.shape[1]
        time = ctx.step * torch.arange(1, count + 1, device=grad.device, dtype=grad.dtype)
        coefficient = torch.complex(grad[1], grad[0]) * time[:, None]
        result = coefficient[-1] * first
        for k in range(count - 2, -1, -1):
            result.add_(coefficient[k]).mul_(first)
        return result.real, None, None
