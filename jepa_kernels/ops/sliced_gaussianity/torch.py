"""sliced_gaussianity in eager PyTorch, by blocks of directions.

Knots are equally spaced, so cosine and sine at all of them are the powers of one complex number:
two transcendental functions for each projection instead of two for each knot.
"""

from __future__ import annotations

import torch

from ...backend import ANY_DEVICE, Reason
from .blocks import block_backend
from .inputs import Inputs


def unsupported(inputs: Inputs) -> list[Reason]:
    return []


class Eager:
    """See `blocks.Kernels`."""

    def sums(self, projections: torch.Tensor, count: int, spacing: float) -> torch.Tensor:
        first = _turned(projections, spacing)
        power, sums = first.clone(), [first.sum(0)]
        for _ in range(count - 1):
            sums.append(power.mul_(first).sum(0))
        total = torch.stack(sums)
        return torch.stack((total.real, total.imag))

    def slope_(self, projections: torch.Tensor, coefficients: torch.Tensor, spacing: float) -> None:
        # The real part of sum_k (c[1, k] + i c[0, k]) z^k, by Horner's rule.
        first = _turned(projections, spacing)
        complex_coefficients = torch.complex(coefficients[1], coefficients[0])
        result = complex_coefficients[-1] * first
        for coefficient in reversed(complex_coefficients[:-1]):
            result.add_(coefficient).mul_(first)
        projections.copy_(result.real)


def _turned(projections: torch.Tensor, spacing: float) -> torch.Tensor:
    """exp(i spacing u)."""
    angle = projections * spacing
    # Two real functions and a copy: torch.polar does the same in three times the time.
    return torch.complex(angle.cos(), angle.sin_())


BACKEND = block_backend("torch", ANY_DEVICE, unsupported, Eager())
