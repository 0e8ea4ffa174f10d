"""The inputs of a residual MLP's rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Self

import torch

from ....contract import call_inputs, differentiable
from ..cells import ResidualMLP
from ..hidden_space import HiddenRollout
from ..rollout import fail, without_actions


@call_inputs()
class Inputs(HiddenRollout):
    """One call. in_channels: flat ``[start, stop, ...]`` ranges of the channels that the cell
    reads."""

    weight_out: torch.Tensor = differentiable()
    bias_out: torch.Tensor = differentiable()
    in_channels: list[int]

    cell = "residual_mlp"
    cell_type = ResidualMLP
    halves = 1

    @classmethod
    def of(cls, cell: ResidualMLP, shared: Any, actions: Any, *anchor: Any) -> Self:
        without_actions(actions)
        edges = _edges(cell.in_channels, shared[0].shape[-1] if shared[0].dim() else 0)
        fields: tuple[Any, ...] = (*shared, *anchor, *cell.parameters(), edges)
        return cls(*fields)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.weight_in.shape[0],)

    @property
    def ranges(self) -> list[int]:
        return self.in_channels

    @property
    def inner(self) -> int:
        return sum(self.in_channels[1::2]) - sum(self.in_channels[::2])

    def flop(self, space: str) -> float:
        rows, width, horizon, channels = self.num_rows, *self.widths, self.horizon, self.channels
        if space == "state":
            return 2.0 * rows * horizon * width * (self.inner + channels)
        coupling = width * width * (self.inner + rows * (horizon - 1)) if horizon > 1 else 0
        read = rows * self.kept_steps * channels * width
        return 2.0 * (rows * self.inner * width + coupling + read)

    def check(self) -> None:
        super().check()
        edges, width, channels = self.in_channels, self.weight_in.shape[0], self.channels
        ordered = len(edges) > 1 and len(edges) % 2 == 0 and edges[0] >= 0 and edges[-1] <= channels
        ordered = ordered and all([a < b for a, b in zip(edges[::2], edges[1::2])])
        if not ordered or any([a > b for a, b in zip(edges[1:-1:2], edges[2::2])]):
            _refuse_ranges(channels, tuple(edges))
        self.expect_parameters(
            {
                "weight_in": (width, self.inner),
                "bias_in": (width,),
                "weight_out": (channels, width),
                "bias_out": (channels,),
            }
        )


def _edges(given: Any, channels: int) -> list[int]:
    """`in_channels` of a cell, flat."""
    if given is None:
        return [0, channels]
    pairs = [given] if _is_sequence(given) and given and isinstance(given[0], int) else given
    if not _is_sequence(pairs) or not all([_is_sequence(pair) for pair in pairs]):
        _refuse_ranges(channels, given)
    edges = [edge for pair in pairs for edge in pair]
    if not all([isinstance(edge, int) for edge in edges]):
        _refuse_ranges(channels, given)
    return edges


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence)


def _refuse_ranges(channels: int, got: object) -> NoReturn:
    wanted = f"be ranges (start, stop) within 0 to {channels}, in rising order"
    fail("cell.in_channels", wanted, got)
