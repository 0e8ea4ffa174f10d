"""Objectives of the eager reproduction, at the cost of the published ones: scatter the context to a
dense grid, shift, index with a boolean mask.

Each function takes a `Features` and returns unweighted terms. The published defects are kept on
purpose (the latent-dynamics loss under hard-region weighting carries no gradient, its softmax pools
the batch); this code is a baseline, the fixed versions live in `jepa`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Features:
    """One list entry per mask set j. `targets` [B, N, D] are standardised; `clip` [B, 3, frames,
    height, width]."""

    grid: tuple[int, int, int]
    context: list[torch.Tensor]
    predicted: list[torch.Tensor]
    predicted_context: list[torch.Tensor]
    context_ids: list[torch.Tensor]
    target_ids: list[torch.Tensor]
    targets: torch.Tensor
    clip: torch.Tensor
    patch_size: int = 16
    tubelet_size: int = 2


def average(values: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Mean over the mask sets that had anything to average."""
    return torch.stack(values).mean() if values else like.sum() * 0.0


def at(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.gather(tokens, 1, ids.unsqueeze(-1).repeat(1, 1, tokens.shape[-1]))


def dense(
    z: torch.Tensor, ids: torch.Tensor, grid: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context tokens back on the grid [B, T, H, W, D], and which sites hold one."""
    batch, _, width = z.shape
    count = grid[0] * grid[1] * grid[2]
    full = torch.zeros(batch, count, width, dtype=z.dtype, device=z.device)
    full = full.scatter(1, ids.unsqueeze(-1).expand(-1, -1, width), z)
    present = torch.zeros(batch, count, dtype=torch.bool, device=z.device).scatter(1, ids, True)
    return full.view(batch, *grid, width), present.view(batch, *grid)


def on_grid(features: Features) -> torch.Tensor:
    return features.targets.view(features.targets.shape[0], *features.grid, -1)


def pairs(features: Features, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense context now, dense context one step later, and the boolean mask of valid pairs."""
    full, present = dense(features.context[number], features.context_ids[number], features.grid)
    return full[:, :-1], full[:, 1:], present[:, :-1] & present[:, 1:]


def hard_region(features: Features, temperature: float) -> torch.Tensor:
    values = []
    for predicted, ids in zip(features.predicted, features.target_ids, strict=True):
        error = (predicted - at(features.targets, ids)).abs()
        with torch.no_grad():
            weight = torch.softmax(error.mean(-1) / max(temperature, 1e-6), dim=1) * error.shape[1]
        values.append((weight.unsqueeze(-1) * error).mean())
    return average(values, features.targets)


def delta(features: Features) -> torch.Tensor:
    values, h = [], on_grid(features)
    for number in range(len(features.context)):
        now, later, valid = pairs(features, number)
        if valid.any():
            values.append(((later - now) - (h[:, 1:] - h[:, :-1])).abs()[valid].mean())
    return average(values, features.context[0])


def factorized(features: Features, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    static, orthogonal = [], []
    split = max(1, int(features.context[0].shape[-1] * share))
    for number, z in enumerate(features.context):
        now, later, valid = pairs(features, number)
        if valid.any():
            static.append((later[..., :split] - now[..., :split]).abs()[valid].mean())
        rows = z.flatten(0, 1)
        appearance, dynamics = rows[:, :split], rows[:, split:]
        appearance, dynamics = appearance - appearance.mean(0), dynamics - dynamics.mean(0)
        covariance = appearance.T @ dynamics / (rows.shape[0] - 1)
        orthogonal.append(covariance.square().mean())
    return average(static, features.context[0]), average(orthogonal, features.context[0])


def latent_dynamics(
    features: Features, head: nn.Module, split: int, hard_temperature: float | None
) -> torch.Tensor:
    def term() -> torch.Tensor:
        values, h = [], on_grid(features)
        for number in range(len(features.context)):
            now, _, valid = pairs(features, number)
            if not valid.any():
                continue
            guess = head(now[..., split:])
            error = (guess - (h[:, 1:] - h[:, :-1])).abs()[valid]
            if hard_temperature is not None:
                error = (
                    torch.softmax(error.mean(-1) / hard_temperature, dim=0).unsqueeze(-1)
                    * error.shape[0]
                    * error
                )
            values.append(error.mean())
        return average(values, features.context[0])

    if hard_temperature is None:
        return term()
    with torch.no_grad():
        return term()


def action(features: Features, head: nn.Module, split: int) -> torch.Tensor:
    size = (features.tubelet_size, features.patch_size, features.patch_size)
    colour = F.avg_pool3d(features.clip.float(), size, size).permute(0, 2, 3, 4, 1)
    change, values = colour[:, 1:] - colour[:, :-1], []
    for number in range(len(features.context)):
        now, _, valid = pairs(features, number)
        if valid.any():
            values.append((head(now[..., split:]) - change).abs()[valid].mean())
    return average(values, features.context[0])


def contrastive(features: Features, margin: float) -> torch.Tensor:
    values, h = [], on_grid(features)
    for number in range(len(features.context)):
        now, _, valid = pairs(features, number)
        if valid.any():
            same = F.cosine_similarity(now, h[:, :-1], dim=-1)
            later = F.cosine_similarity(now, h[:, 1:], dim=-1)
            values.append(torch.relu(margin - same + later)[valid].mean())
    return average(values, features.context[0])


def spectral(features: Features) -> torch.Tensor:
    values, h = [], on_grid(features)
    for z, ids in zip(features.context, features.context_ids, strict=True):
        full, present = dense(z, ids, features.grid)
        complete = present.all(1)
        if features.grid[0] < 4 or not complete.any():
            continue
        frequencies = features.grid[0] // 2 + 1
        gain = torch.linspace(0.1, 1.0, frequencies, device=z.device).view(1, frequencies, 1, 1, 1)
        gap = gain * (torch.fft.rfft(full.float(), dim=1) - torch.fft.rfft(h.float(), dim=1))
        values.append(gap.abs().permute(0, 2, 3, 1, 4)[complete].mean())
    return average(values, features.context[0])


def kinematic(features: Features, kind: str, share: float) -> torch.Tensor:
    h = on_grid(features)
    h = h[..., : int(h.shape[-1] * share)]
    velocity = h[:, 1:] - h[:, :-1]
    if kind == "acceleration":
        return (velocity[:, 1:] - velocity[:, :-1]).abs().mean()
    if kind == "huber":
        return F.huber_loss(h[:, 1:], h[:, :-1], delta=0.1)
    return velocity.abs().mean()


def velocity_gate(features: Features, percentile: float) -> torch.Tensor:
    values, h = [], on_grid(features)
    with torch.no_grad():
        speed = (h[:, 1:] - h[:, :-1]).float().norm(dim=-1)
        limit = torch.quantile(speed.flatten(2), percentile, dim=2)[..., None, None]
        gate = (speed <= limit).float()
    for number in range(len(features.context)):
        now, later, valid = pairs(features, number)
        if valid.any():
            values.append((gate.unsqueeze(-1) * (later - now).abs())[valid].mean())
    return average(values, features.context[0])


def hamiltonian(features: Features, energy: nn.Module, dt: float) -> torch.Tensor:
    values, h = [], on_grid(features)
    half = features.context[0].shape[-1] // 2
    for number in range(len(features.context)):
        now, _, valid = pairs(features, number)
        if not valid.any():
            continue
        state, goal = now[valid], h[:, 1:][valid]
        position, momentum = state[:, :half], state[:, half:]

        def force(q: torch.Tensor, p: torch.Tensor, wrt: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(
                energy(torch.cat([q, p], dim=-1)).sum(), wrt, create_graph=True
            )[0]

        moved = position + dt * force(position, momentum, momentum)
        pushed = momentum - dt * force(moved, momentum, moved)
        values.append(
            (moved - goal[:, :half]).abs().mean() + (pushed - goal[:, half:]).abs().mean()
        )
    return average(values, features.context[0])


def sliced_gaussianity(features: Features, projection: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([z.flatten(0, 1) for z in features.context]).float()
    points = torch.linspace(0.0, 3.0, 17, device=rows.device)
    step = 3.0 / 16
    goal = torch.exp(-points.square() / 2)
    weight = goal * 2 * step
    weight[0], weight[-1] = weight[0] / 2, weight[-1] / 2
    phase = (rows @ projection).unsqueeze(-1) * points
    gap = (phase.cos().mean(0) - goal).square() + phase.sin().mean(0).square()
    return (rows.shape[0] * (gap * weight).sum(-1)).mean()


def mask_distance(
    context_ids: torch.Tensor, target_ids: torch.Tensor, grid: tuple[int, int, int]
) -> torch.Tensor:
    """Square root of the lattice distance to the nearest target, one context token at a time in
    Python."""

    def lattice(ids: torch.Tensor) -> torch.Tensor:
        plane = grid[1] * grid[2]
        return torch.stack([ids // plane, ids % plane // grid[2], ids % grid[2]], dim=-1).float()

    rows = []
    for seen, hidden in zip(context_ids, target_ids, strict=True):
        hidden_sites = lattice(hidden)
        rows.append(
            torch.stack([(site - hidden_sites).norm(dim=-1).min() for site in lattice(seen)])
        )
    return torch.stack(rows).sqrt()


Term = Callable[[Features], torch.Tensor]
