"""The public function of sliced_gaussianity."""

from __future__ import annotations

from typing import Any

import torch

from ... import checks
from ...backend import resolve
from ..collective import sum_over_ranks
from .contract import OP, prepare
from .inputs import NAME
from .statistic import statistic


def sliced_gaussianity(
    features: torch.Tensor,
    directions: torch.Tensor | int = 1024,
    *,
    seed: int = 0,
    step: int = 0,
    points: int = 17,
    largest_point: float = 3.0,
    group: Any = None,
    backend: str | None = None,
) -> torch.Tensor:
    """How far random one-dimensional projections of the features are from N(0, 1): SIGReg.

    ``N * mean over directions a of the integral over [-T, T] of |mean_n exp(i t x_n.a) -
    exp(-t^2/2)|^2 exp(-t^2/2) dt``, by the trapezium rule on K knots of [0, T] that count twice
    (Balestriero and LeCun: LeJEPA, arXiv 2511.08544; the statistic is that of Epps and Pulley,
    1983).

    Args:
        features: ``[N, D]``, float32, bfloat16, float16 or float64, any strides. Differentiated.
        directions: ``[D, S]`` in the dtype and on the device of features, one direction for each
            column, used as they are and not differentiated; or their number S: then unit columns
            are drawn from (seed, step), the same in every process (`random_directions`).
        seed, step: of drawn directions; ints of 0 or more. Count `step` up for new directions.
        points: K, at least 2, t = 0 included.
        largest_point: T, above 0. ``points=17, largest_point=3.0`` is LeJEPA's code,
            ``points=9, largest_point=5.0`` the 17 points on [-5, 5] of its paper.
        group: a process group whose processes' rows count as one batch, or None for the rows given
            here. The sums of all processes and their row counts are added in one all-reduce, and
            their gradients in another. Under DDP or FSDP, which average gradients, every process
            then has the loss and the gradients of the whole batch.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Returns:
        The statistic, a scalar: float32, or float64 for float64 features. 0 without rows. Equal
        rows, and rows of zeros, are rows like all others.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        BackendUnsupportedError: the chosen backend cannot run this call; every reason is listed.

    Notes:
        No tensor has a size of N * S * K: directions pass in blocks of which the sums are kept.
        Sums are float32 (float64 for float64) at any input dtype. Without a group the gradient is
        computed along with the statistic, as float32 ``[N, D]``. No atomics: results repeat
        bitwise. Double backward is not supported. Under autocast features and directions take the
        autocast dtype, as in torch.mm.

    Example:
        >>> import torch
        >>> from jepa_kernels import sliced_gaussianity
        >>> x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
        >>> bool(sliced_gaussianity(x) < 0.01 * sliced_gaussianity(x + 1.0))
        True
    """
    checks.is_tensor(NAME, "features", features)
    features, directions = checks.under_autocast(features.device.type, features, directions)
    inputs = prepare(
        features,
        directions,
        seed=seed,
        step=step,
        points=points,
        largest_point=largest_point,
        group=group,
    )
    out, _ = OP.run(inputs, resolve(OP, inputs, backend))
    if group is None:
        return out
    rows = out.new_full((1,), float(inputs.rows))
    total = sum_over_ranks(torch.cat((out.flatten(), rows)), group)
    return statistic(
        total[:-1].view_as(out), total[-1].detach(), inputs.points, inputs.largest_point
    )
