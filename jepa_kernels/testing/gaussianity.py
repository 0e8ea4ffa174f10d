"""Cases of sliced_gaussianity for tests: inputs, the float64 oracle, and the comparison. Public, so
that a new backend can be held to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..backend import resolve
from ..ops.sliced_gaussianity.contract import OP, prepare
from ..ops.sliced_gaussianity.directions import random_directions
from . import assert_within_budget

# Cosine and sine in float32: the rounding of the result, and half a unit in the last place of an
# angle of at most 2.
ANGLE_ERROR = 1.5e-7
# What the sums of 64 rows may be off by rounding alone.
SUMMED_ERROR = 1e-4
# A norm of gradients after two roundings to float16.
FLOAT16_GRADIENT_NORM = 2e-3
# Moments of trained features against those of N(0, 1): training is short.
TRAINED_MOMENTS = 0.2


@dataclass(frozen=True)
class GaussianityCase:
    """Inputs of one call, as float64 values that `dtype` represents exactly."""

    features: torch.Tensor
    directions: torch.Tensor
    grad_out: torch.Tensor
    dtype: torch.dtype
    output: str
    points: int
    largest_point: float


def gaussianity_case(
    rows: int = 37,
    channels: int = 20,
    slices: int = 24,
    *,
    output: str = "statistic",
    points: int = 17,
    largest_point: float = 3.0,
    magnitude: float = 1.0,
    mean: float = 0.3,
    strided: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> GaussianityCase:
    """A random case.

    Args:
        output: ``statistic``, or ``sums`` as between processes.
        magnitude, mean: standard deviation and mean of the features.
        strided: features are a view with gaps between rows and between channels.
        Other arguments: as named in sliced_gaussianity.
    """
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    features = (values(rows, channels) * magnitude + mean).to(dtype).double()
    if strided:
        features = torch.stack((features, features), dim=2).repeat(1, 2, 1)[:, :channels, 0]
    directions = random_directions(channels, slices, seed, dtype=dtype).double()
    shape = (2, points - 1, slices) if output == "sums" else ()
    return GaussianityCase(
        features, directions, values(*shape), dtype, output, points, largest_point
    )


def run_gaussianity(
    case: GaussianityCase, backend: str, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Output and gradient of one backend, in the case's dtype unless another is named."""
    dtype = case.dtype if dtype is None else dtype
    features = case.features.to(device=device, dtype=dtype).detach().requires_grad_()
    directions = case.directions.to(device=device, dtype=dtype)
    inputs = prepare(features, directions, points=case.points, largest_point=case.largest_point)
    inputs = replace(inputs, output=case.output)
    out = OP.run(inputs, resolve(OP, inputs, backend))[0]
    (gradient,) = torch.autograd.grad(out, features, case.grad_out.to(out))
    return {"out": out.detach().cpu(), "grad_features": gradient.cpu()}


def check_gaussianity(
    case: GaussianityCase, backend: str, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Runs `backend` and holds its results to the error budget against the float64 reference.

    Raises:
        AssertionError: naming the tensor, its error and the budget.
    """
    oracle = run_gaussianity(case, "reference", torch.float64)
    wide = case.dtype in (torch.float32, torch.float64)
    peer = None if wide else run_gaussianity(case, "reference")
    actual = run_gaussianity(case, backend, device=device)
    for name, tensor in actual.items():
        assert_within_budget(
            f"{backend} {name}",
            tensor,
            oracle[name],
            None if peer is None else peer[name],
            gradient=name.startswith("grad"),
            dtype=case.dtype,
        )
    return actual
