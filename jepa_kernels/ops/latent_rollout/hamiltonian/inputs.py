"""The inputs of a Hamiltonian's rollout."""

from __future__ import annotations

from typing import Any, Self

import torch

from .... import checks
from ....contract import call_inputs, differentiable
from ..cells import Hamiltonian
from ..hidden_space import HiddenRollout
from ..rollout import NAME, fail, without_actions


@call_inputs()
class Inputs(HiddenRollout):
    """One call."""

    weight_hidden: torch.Tensor = differentiable()
    bias_hidden: torch.Tensor = differentiable()
    weight_energy: torch.Tensor = differentiable()
    time_step: float

    cell = "hamiltonian"
    cell_type = Hamiltonian
    halves = 2

    @classmethod
    def of(cls, cell: Hamiltonian, shared: Any, actions: Any, *anchor: Any) -> Self:
        without_actions(actions)
        fields: tuple[Any, ...] = (*shared, *anchor, *cell.parameters(), cell.time_step)
        return cls(*fields)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.weight_in.shape[0], self.weight_hidden.shape[0])

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """W2, b2 and w3."""
        return self.weight_hidden, self.bias_hidden, self.weight_energy

    @property
    def ranges(self) -> list[int]:
        return [0, self.channels]

    @property
    def inner(self) -> int:
        return self.channels // 2

    def flop(self, space: str) -> float:
        rows, channels, half_steps = self.num_rows, self.channels, 2 * self.horizon
        width, middle = self.widths
        energy = 2 * width * middle
        if space == "state":
            return 2.0 * rows * half_steps * (channels * width + energy + self.inner * width)
        coupling = width * width * (self.inner + rows * (half_steps - 1))
        read = rows * self.kept_steps * channels * width
        return 2.0 * (rows * channels * width + coupling + rows * half_steps * energy + read)

    def check(self) -> None:
        super().check()
        width, channels = self.weight_in.shape[0], self.channels
        if channels % 2:
            fail("states", "have an even number of channels for a Hamiltonian", channels)
        checks.is_finite_number(NAME, "cell.time_step", self.time_step)
        middle = self.matrix_shape("weight_hidden", "[hidden, hidden]")[0]
        self.expect_parameters(
            {
                "weight_in": (width, channels),
                "bias_in": (width,),
                "weight_hidden": (middle, width),
                "bias_hidden": (middle,),
                "weight_energy": (1, middle),
            }
        )
