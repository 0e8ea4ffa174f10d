"""The op of a GRU's rollout."""

from __future__ import annotations

import torch

from ..cells import GRU
from ..rollout import Zeros, rollout_op
from .inputs import Inputs


def _example(channels: int, horizon: int, rows: int, zeros: Zeros) -> tuple[GRU, torch.Tensor]:
    gates = 3 * channels
    weights = zeros(gates, 8), zeros(gates, channels), zeros(gates), zeros(gates)
    return GRU(*weights, zeros(channels), zeros(channels)), zeros(horizon, rows, 8)


OP = rollout_op("rollout_gru", __package__, Inputs, 3, _example)
