"""SIGReg as a module, and the loss of LeJEPA that is built on it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .. import checks
from ..ops.sliced_gaussianity import random_directions, sliced_gaussianity


class SlicedGaussianity(nn.Module):
    """`jepa_kernels.sliced_gaussianity` with new directions at every training step.

    Directions are drawn from (seed, step), so every process has the same ones without talking. The
    step is counted in `forward` while the module trains, and saved in its state dict; a step that
    is given is used instead, and not counted. Give it in compiled code.

    Args:
        directions: how many, S.
        points, largest_point, group, backend: as of `jepa_kernels.sliced_gaussianity`.
        seed: of the directions.

    Attributes:
        step: int, the training steps counted so far.

    Example:
        >>> import torch
        >>> from jepa_kernels.nn import SlicedGaussianity
        >>> sigreg = SlicedGaussianity(64)
        >>> sigreg(torch.randn(2, 100, 8)).shape  # the mean of two views
        torch.Size([])
        >>> sigreg.step
        1
    """

    def __init__(
        self,
        directions: int = 1024,
        *,
        points: int = 17,
        largest_point: float = 3.0,
        seed: int = 0,
        group: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.directions, self.points, self.largest_point = directions, points, largest_point
        self.seed, self.group, self.backend = seed, group, backend
        self.step = 0

    def forward(self, features: torch.Tensor, step: int | None = None) -> torch.Tensor:
        """The statistic of features ``[N, D]``; of ``[..., N, D]`` the mean over all sets of N
        rows, such as views, with the same directions."""
        if step is None:
            step = self.step
            if self.training:
                self.step += 1
        return _mean_statistic(
            features,
            self.directions,
            seed=self.seed,
            step=step,
            points=self.points,
            largest_point=self.largest_point,
            group=self.group,
            backend=self.backend,
        )

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.step, device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.step = int(state)

    def extra_repr(self) -> str:
        return (
            f"directions={self.directions}, points={self.points}, "
            f"largest_point={self.largest_point}, seed={self.seed}"
        )


class LeJEPALoss(NamedTuple):
    """What `lejepa_loss` returns: the loss, and its two terms before they are weighted."""

    loss: torch.Tensor
    prediction: torch.Tensor
    gaussianity: torch.Tensor


def lejepa_loss(
    projections: torch.Tensor,
    *,
    global_views: int | None = None,
    weight: float = 0.05,
    directions: int = 1024,
    seed: int = 0,
    step: int = 0,
    points: int = 17,
    largest_point: float = 3.0,
    group: Any = None,
    backend: str | None = None,
) -> LeJEPALoss:
    """View agreement and SIGReg (Balestriero and LeCun: LeJEPA, arXiv 2511.08544).

    ``(1 - weight) * mean over views v and samples of |z_v - mean over global views|^2 / D +
    weight * mean over views of sliced_gaussianity(z_v)``.

    Args:
        projections: z, ``[V, N, D]``: V views of N samples, the global views first. Differentiated.
        global_views: how many views make the centre; None is all of them.
        weight: of SIGReg, from 0 to 1.
        directions: how many.
        seed, step, points, largest_point, group, backend: as of `jepa_kernels.sliced_gaussianity`.
            Give the number of the training step. With a group the statistic is that of all
            processes' rows; the agreement stays that of this process's samples, whose mean over
            processes DDP takes.

    Returns:
        The loss and its terms, scalars.

    Raises:
        TypeError, ValueError: as `jepa_kernels.sliced_gaussianity`; and for projections of another
            rank, global_views beyond V, or a weight out of its range.

    Example:
        >>> import torch
        >>> from jepa_kernels.nn import lejepa_loss
        >>> z = torch.randn(8, 32, 16, requires_grad=True)  # 2 global and 6 local views
        >>> lejepa_loss(z, global_views=2, step=0).loss.backward()
    """
    name = "lejepa_loss"
    checks.is_tensor(name, "projections", projections)
    checks.has_rank(name, "projections", projections, 3, "[V, N, D]")
    views = projections.shape[0]
    global_views = views if global_views is None else global_views
    if not 1 <= global_views <= views:
        wanted = f"be from 1 to {views}, the number of views"
        raise ValueError(checks.sentence(name, "global_views", wanted, global_views))
    checks.is_finite_number(name, "weight", weight)
    if not 0.0 <= weight <= 1.0:
        raise ValueError(checks.sentence(name, "weight", "be from 0 to 1", weight))
    centre = projections[:global_views].mean(0)
    prediction = (projections - centre).square().mean()
    gaussianity = _mean_statistic(
        projections,
        directions,
        seed=seed,
        step=step,
        points=points,
        largest_point=largest_point,
        group=group,
        backend=backend,
    )
    return LeJEPALoss((1.0 - weight) * prediction + weight * gaussianity, prediction, gaussianity)


def _mean_statistic(
    features: torch.Tensor, directions: int, *, seed: int, step: int, **options: Any
) -> torch.Tensor:
    """The mean statistic of all sets of rows in ``[..., N, D]``."""
    checks.is_tensor("sliced_gaussianity", "features", features)
    if features.dim() < 3:
        return sliced_gaussianity(features, directions, seed=seed, step=step, **options)
    columns = random_directions(
        features.shape[-1], directions, seed, step, dtype=features.dtype, device=features.device
    )
    sets = features.flatten(0, -3).unbind()
    return torch.stack([sliced_gaussianity(rows, columns, **options) for rows in sets]).mean()
