"""Hamiltonian dynamics: the features of a site, read as (q, p), should take one symplectic Euler step of a learned energy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from jepa.objectives.base import FeatureDims, Objective, ObjectiveConfig, ObjectiveContext


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    hidden: int = 256
    time_step: float = 0.1


def minimum_frames(cfg: Config) -> int:
    return 2


class Energy(nn.Module):
    """G(q, p) = MLP(D - hidden - hidden - 1, gelu). Only its gradient is used, so the last bias never trains."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, state: Tensor) -> Tensor:
        return self.net(state).squeeze(-1)

    def hidden_gradient(self, activation: Tensor) -> Tensor:
        """dG/da of the first pre-activation a = W1 x + b1; dG/dx is this times W1."""
        middle, last = self.net[2], self.net[4]
        upper = middle(functional.gelu(activation))
        return gelu_slope(activation) * ((gelu_slope(upper) * last.weight[0]) @ middle.weight)


def build_head(dims: FeatureDims, cfg: Config) -> nn.Module:
    if dims.width % 2:
        raise ValueError(f"hamiltonian: the feature width must be even, got {dims.width}.")
    return Energy(dims.width, cfg.hidden)


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over pairs of |q' - h_q(t+1)|^r / r and of |p' - h_p(t+1)|^r / r, added.

    q, p = halves of Z(t); q' = q + dt dG/dp(q, p); p' = p - dt dG/dq(q', p). The derivatives are written out and differentiated once.
    """
    energy = ctx.heads["hamiltonian"]
    tokens, _ = ctx.pair_tokens
    half = tokens.shape[-1] // 2
    position, momentum = tokens[:, :half], tokens[:, half:]
    first = energy.net[0]
    weight_q, weight_p = first.weight[:, :half], first.weight[:, half:]
    activation = first(tokens)
    slope = energy.hidden_gradient(activation)
    position = position + cfg.time_step * (slope @ weight_p)
    # Moving q by dt * slope W_p moves the pre-activation by dt * slope (W_p W_q^T): no second product with the wide state.
    moved = activation + cfg.time_step * (slope @ (weight_p @ weight_q.t()))
    momentum = momentum - cfg.time_step * (energy.hidden_gradient(moved) @ weight_q)
    target = ctx.pair_targets[1]
    residual = ctx.power(position - target[:, :half]).mean(-1) + ctx.power(momentum - target[:, half:]).mean(-1)
    return Objective(ctx.pair_mean(residual))


def gelu_slope(x: Tensor) -> Tensor:
    """d gelu / dx = Phi(x) + x phi(x), differentiable."""
    return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
