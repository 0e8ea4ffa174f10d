"""Hamiltonian dynamics: the features of a site, read as (q, p), should take symplectic Euler steps
of a learned energy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from jepa.objectives.base import FeatureDims, Objective, ObjectiveConfig, ObjectiveContext
from jepa_kernels import Hamiltonian


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    hidden: int = 256
    time_step: float = 0.1
    horizon: int = 1

    @property
    def minimum_frames(self) -> int:
        return self.horizon + 1

    @property
    def pair_horizon(self) -> int:
        return self.horizon

    def build_head(self, dims: FeatureDims) -> nn.Module:
        if dims.width % 2:
            raise ValueError(f"hamiltonian: the feature width must be even, got {dims.width}.")
        return Energy(dims.width, self.hidden)


class Energy(nn.Module):
    """G(q, p) = MLP(D - hidden - hidden - 1, gelu). Only its gradient is used, so the last bias
    never trains."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, state: Tensor) -> Tensor:
        return self.net(state).squeeze(-1)


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over pairs of |q_k - h_q(t+k)|^r / r and of |p_k - h_p(t+k)|^r / r, added, and
    averaged over k = 1..horizon.

    q_0, p_0 = halves of Z(t); q' = q + dt dG/dp(q, p); p' = p - dt dG/dq(q', p). Horizon 1 is the
    published loss.
    """
    cell = Hamiltonian.from_module(ctx.heads["hamiltonian"].net, cfg.time_step)
    errors = ctx.rollout_errors(
        "hamiltonian", cell, cfg.horizon, anchored=False, exponent=ctx.loss_exponent
    )
    return Objective(ctx.pair_mean(errors.mean(0)), ctx.step_metrics(errors))
