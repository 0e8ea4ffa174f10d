"""The op of a GRU's rollout."""

from __future__ import annotations

from ..cells import GRU
from ..rollout import rollout_op
from .inputs import Inputs


def _example(channels, horizon, rows, zeros):
    gates = 3 * channels
    weights = zeros(gates, 8), zeros(gates, channels), zeros(gates), zeros(gates)
    return GRU(*weights, zeros(channels), zeros(channels)), zeros(horizon, rows, 8)


OP = rollout_op("rollout_gru", __package__, Inputs, 3, _example)
