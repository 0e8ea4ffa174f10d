"""The op of a residual MLP's rollout."""

from __future__ import annotations

from ..cells import ResidualMLP
from ..rollout import Zeros, rollout_op
from .inputs import Inputs


def _example(channels: int, horizon: int, rows: int, zeros: Zeros) -> tuple[ResidualMLP, None]:
    weights = zeros(256, channels), zeros(256), zeros(channels, 256), zeros(channels)
    return ResidualMLP(*weights), None


OP = rollout_op("rollout_mlp", __package__, Inputs, 4, _example)
