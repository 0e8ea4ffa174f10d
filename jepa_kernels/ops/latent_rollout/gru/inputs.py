"""The inputs of a GRU's rollout."""

from __future__ import annotations

from typing import Any, Self

import torch

from .... import checks
from ....backend import Backend
from ....contract import call_inputs, differentiable
from ..cells import GRU
from ..rollout import NAME, Rollout, fail


@call_inputs()
class Inputs(Rollout):
    """One call."""

    actions: torch.Tensor = differentiable()
    weight_input: torch.Tensor = differentiable()
    weight_state: torch.Tensor = differentiable()
    bias_input: torch.Tensor = differentiable()
    bias_state: torch.Tensor = differentiable()
    norm_weight: torch.Tensor = differentiable()
    norm_bias: torch.Tensor = differentiable()
    epsilon: float

    cell = "gru"
    cell_type = GRU

    @classmethod
    def of(cls, cell: GRU, shared: Any, actions: Any, anchor: Any, anchor_rows: Any) -> Self:
        if actions is None:
            raise TypeError(checks.sentence(NAME, "actions", "be given for a GRU", "None"))
        for argument, given in (("anchor", anchor), ("anchor_rows", anchor_rows)):
            if given is not None:
                wanted = "be None for a GRU, whose states are normalised"
                fail(argument, wanted, checks.type_name(given))
        fields: tuple[Any, ...] = (*shared, actions, *cell.parameters(), cell.epsilon)
        return cls(*fields)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.channels,)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The parameters, in the order of the cell."""
        return [
            *(self.weight_input, self.weight_state),
            *(self.bias_input, self.bias_state),
            *(self.norm_weight, self.norm_bias),
        ]

    def flop(self, space: str = "state") -> float:
        """FLOP (2 per multiply-add) of the products with the state of one forward pass."""
        return 2.0 * self.num_rows * self.horizon * 3 * self.channels * self.channels

    def details(self) -> list[str]:
        return ["space      state (a GRU moves its whole state)"]

    def check(self) -> None:
        super().check()
        checks.is_finite_number(NAME, "cell.epsilon", self.epsilon)
        channels, gates = self.channels, 3 * self.channels
        width = self.matrix_shape("weight_input", "[3 D, A]")[1]
        self.expect_parameters(
            {
                "weight_input": (gates, width),
                "weight_state": (gates, channels),
                "bias_input": (gates,),
                "bias_state": (gates,),
                "norm_weight": (channels,),
                "norm_bias": (channels,),
            }
        )
        self.expect("actions", self.actions, (self.horizon, self.num_rows, width))

    def outputs(self, backend: Backend) -> list[tuple[list[int], torch.dtype]]:
        """The result, gates, states."""
        gates, states = [0], [0]
        if self.save:
            states = [self.horizon, self.num_rows, self.channels]
            gates = [*states[:2], 4 * self.channels]
        return [self.out(), *((shape, self.accumulate_dtype) for shape in (gates, states))]
