"""Forward and backward by blocks of directions, around the kernels of a backend.

With u = X A of a block ``[N, columns]`` and t_k = k * spacing, a kernel sums cos(t_k u) and
sin(t_k u) over the rows. The gradient of a function of these sums is
    du = sum_k t_k (g_sin[k] cos(t_k u) - g_cos[k] sin(t_k u)),   dX = du A^T.
The statistic of a direction needs the sums of that direction alone, so its gradient follows while u
is still there, and backward only scales it. Sums that other processes add to are not complete in
forward: there backward computes u once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch

from ... import checks
from ...backend import Backend, Reason
from ..products import add_matmul, matmul_into, widened_on_cpus
from .inputs import NAME, Inputs
from .statistic import knots

# Bytes of a block of projections, and its fewest columns: on a CPU a block stays in the L3 cache, a
# GPU needs as much to be busy.
_BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**26}
_FEWEST = 64


class Kernels(Protocol):
    """What a backend computes of a block of projections, contiguous ``[N, columns]`` in the
    accumulation dtype."""

    def sums(self, projections: torch.Tensor, count: int, spacing: float) -> torch.Tensor:
        """``[2, count, columns]``: cosines and sines, summed over the rows, of k * spacing * u for
        k = 1 .. count."""

    def slope_(self, projections: torch.Tensor, coefficients: torch.Tensor, spacing: float) -> None:
        """Writes ``sum_k (c[1, k] cos(k spacing u) - c[0, k] sin(k spacing u))`` in the place of
        u; coefficients ``[2, count, columns]``."""


def block_backend(
    name: str,
    devices: tuple[str, ...],
    unsupported: Callable[[Inputs], list[Reason]],
    kernels: Kernels,
    on: Callable[[torch.Tensor], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Backend:
    """A backend from its kernels.

    Args:
        name, devices, unsupported: as of `Backend`.
        kernels: see `Kernels`.
        on: what to enter around the kernels, given a tensor.
    """

    def run(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        with on(inputs.features):
            return forward(_multiplied(inputs), kernels)

    def differentiate(
        inputs: Inputs, saved: list[torch.Tensor], grad_out: torch.Tensor, needs: list[bool]
    ) -> list[torch.Tensor]:
        if not inputs.save:
            raise ValueError(checks.sentence(NAME, "save", "be True for backward", False))
        if inputs.output == "statistic":
            return [(saved[0] * grad_out).to(inputs.dtype)]
        with on(inputs.features):
            return [backward(_multiplied(inputs), kernels, grad_out).to(inputs.dtype)]

    return Backend(name, devices, unsupported, run, differentiate)


def forward(inputs: Inputs, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums and nothing, or the statistic and its gradient (nothing unless saved)."""
    dtype, count, spacing = inputs.accumulate_dtype, inputs.count, inputs.spacing
    nothing = torch.empty(0, dtype=dtype, device=inputs.features.device)
    if inputs.output == "sums":
        sums = nothing.new_empty((2, count, inputs.slices))
        for columns, projections in _projections(inputs):
            sums[:, :, columns] = kernels.sums(projections, count, spacing)
        return sums, nothing
    at = knots(inputs.points, inputs.largest_point, nothing)
    # N times the distance, averaged over the directions.
    scale = inputs.rows / inputs.slices
    # The mean over directions is taken of the result: in float16 their shares would be too small.
    to_slope = at.weight * at.time * 2.0
    total, gradient = nothing.new_zeros(()), None
    for columns, projections in _projections(inputs):
        sums = kernels.sums(projections, count, spacing)
        residual = at.residual(sums, max(inputs.rows, 1))
        total += (at.weight * residual.square()).sum()
        if inputs.save:
            kernels.slope_(projections, residual * to_slope, spacing)
            gradient = _add_gradient(gradient, inputs, projections, columns)
    return total * scale, nothing if gradient is None else gradient.div_(inputs.slices)


def backward(inputs: Inputs, kernels: Kernels, grad_sums: torch.Tensor) -> torch.Tensor:
    """The gradient of the features from that of the sums."""
    # A share of a mean may be too small for a product in float16.
    largest = grad_sums.abs().amax().clamp(min=torch.finfo(grad_sums.dtype).tiny)
    to_slope = grad_sums / largest * knots(inputs.points, inputs.largest_point, grad_sums).time
    gradient = None
    for columns, projections in _projections(inputs):
        kernels.slope_(projections, to_slope[:, :, columns].contiguous(), inputs.spacing)
        gradient = _add_gradient(gradient, inputs, projections, columns)
    assert gradient is not None  # there is at least one direction
    return gradient.mul_(largest)


def _multiplied(inputs: Inputs) -> Inputs:
    """The same in float32 on a CPU that does not multiply the dtype."""
    if inputs.device_type != "cpu" or not widened_on_cpus(inputs.dtype):
        return inputs
    return replace(inputs, features=inputs.features.float(), directions=inputs.directions.float())


def _projections(inputs: Inputs) -> Iterator[tuple[slice, torch.Tensor]]:
    """Columns of a block, and X A of them in memory that every block uses."""
    features, directions, dtype = inputs.features, inputs.directions, inputs.accumulate_dtype
    rows, slices = inputs.rows, inputs.slices
    limit = _BLOCK_BYTES.get(inputs.device_type, _BLOCK_BYTES["cuda"])
    fitting = limit // (max(rows, 1) * dtype.itemsize)
    width = min(slices, max(_FEWEST, fitting // _FEWEST * _FEWEST))
    memory = torch.empty(rows * width, dtype=dtype, device=features.device)
    for start in range(0, slices, width):
        columns = slice(start, min(start + width, slices))
        block = memory[: rows * (columns.stop - start)].view(rows, columns.stop - start)
        matmul_into(block, features, directions[:, columns], features.dtype)
        yield columns, block


def _add_gradient(
    gradient: torch.Tensor | None, inputs: Inputs, slope: torch.Tensor, columns: slice
) -> torch.Tensor:
    return add_matmul(gradient, slope, inputs.directions[:, columns].mT, inputs.dtype)
