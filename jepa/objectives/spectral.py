"""Spectral matching: complete temporal columns of context and target should have the same Fourier
coefficients, high ones most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jepa.objectives.base import Objective, ObjectiveConfig, ObjectiveContext


@dataclass(frozen=True)
class Config(ObjectiveConfig):
    lowest_gain: float = 0.1

    @property
    def minimum_frames(self) -> int:
        return 4


def compute(ctx: ObjectiveContext, cfg: Config) -> Objective:
    """1/J sum_j mean over complete columns, frequencies and channels of g_f |rfft(Z)_f -
    rfft(h)_f|, g linear from 0.1 to 1."""
    columns, rows = ctx.masks.columns, ctx.masks.column_rows
    sites, steps = columns.shape
    width = ctx.context_tokens.shape[-1]
    tokens = ctx.context_tokens.index_select(0, columns.reshape(-1))
    targets = ctx.target.index_select(0, rows.reshape(-1))
    # The transform is linear, so one of the difference replaces two.
    coefficients = torch.fft.rfft((tokens - targets).view(sites, steps, width), dim=1)
    gain = torch.linspace(
        cfg.lowest_gain, 1.0, steps // 2 + 1, device=tokens.device, dtype=tokens.dtype
    )
    return Objective(ctx.column_mean((coefficients.abs() * gain[:, None]).mean((1, 2))))
