"""The op of a Hamiltonian's rollout."""

from __future__ import annotations

from ..cells import Hamiltonian
from ..rollout import Zeros, rollout_op
from .inputs import Inputs


def _example(channels: int, horizon: int, rows: int, zeros: Zeros) -> tuple[Hamiltonian, None]:
    first, second = (zeros(256, channels), zeros(256)), (zeros(256, 256), zeros(256))
    return Hamiltonian(*first, *second, zeros(1, 256)), None


OP = rollout_op("rollout_hamiltonian", __package__, Inputs, 4, _example)
