"""From sums over rows to the statistic of Epps and Pulley: knots, weights, residuals.

The distance of characteristic functions is the integral of ``|phi_x(t) - exp(-t^2/2)|^2
exp(-t^2/2)`` over ``[-T, T]``, by the trapezium rule. The integrand is even, so knots lie on ``[0,
T]`` and count twice; it is 0 at t = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Knots(NamedTuple):
    """``[points - 1, 1]`` each, in rising order, without t = 0."""

    time: torch.Tensor
    normal: torch.Tensor  # the characteristic function of N(0, 1)
    weight: torch.Tensor  # of a squared distance

    def residual(self, sums: torch.Tensor, rows: torch.Tensor | int) -> torch.Tensor:
        """Mean cosine minus that of N(0, 1), and mean sine: ``[2, points - 1, S]``."""
        mean = sums / rows
        return torch.stack((mean[0] - self.normal, mean[1]))


def knots(points: int, largest_point: float, like: torch.Tensor) -> Knots:
    """Those of a call, on the device of `like` and in its dtype."""
    spacing = largest_point / (points - 1)
    number = torch.arange(1, points, device=like.device, dtype=like.dtype)[:, None]
    time = number * spacing
    normal = torch.exp(time.square() * -0.5)
    return Knots(time, normal, normal * torch.where(number < points - 1, 2.0 * spacing, spacing))


def statistic(
    sums: torch.Tensor, rows: torch.Tensor, points: int, largest_point: float
) -> torch.Tensor:
    """The mean over directions of rows times the distance, from sums ``[2, points - 1, S]`` over
    `rows` rows; 0 where there is no row."""
    at = knots(points, largest_point, sums)
    residual = at.residual(sums, rows.clamp(min=1.0))
    return rows * (at.weight * residual.square()).sum((0, 1)).mean()
