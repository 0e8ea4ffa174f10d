"""The cells that can be rolled out: dataclasses of parameters, in torch.nn.Linear and
torch.nn.GRUCell layouts.

Shape letters: D state channels, A action channels, h hidden units of the layer that reads the
state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ResidualMLP:
    """x' = x + W2 gelu(W1 x[in_channels] + b1) + b2, with the exact (erf) gelu.

    Attributes:
        weight_in: W1 ``[h, in]``; bias_in: b1 ``[h]``; weight_out: W2 ``[D, h]``; bias_out: b2
            ``[D]``.
        in_channels: the channels the cell reads, as ``(start, stop)`` or a sequence of such pairs
            in rising order; None is all of them.
    """

    weight_in: torch.Tensor
    bias_in: torch.Tensor
    weight_out: torch.Tensor
    bias_out: torch.Tensor
    in_channels: tuple[int, int] | Sequence[tuple[int, int]] | None = None

    @classmethod
    def from_module(
        cls,
        module: nn.Sequential,
        in_channels: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    ) -> ResidualMLP:
        """The cell of ``nn.Sequential(nn.Linear(in, h), nn.GELU(), nn.Linear(h, D))``, sharing its
        parameters."""
        first, last = _layers("ResidualMLP", module, 3)
        return cls(first.weight, first.bias, last.weight, last.bias, in_channels)

    def parameters(self) -> list[torch.Tensor]:
        return [self.weight_in, self.bias_in, self.weight_out, self.bias_out]


@dataclass(frozen=True)
class Hamiltonian:
    """One symplectic Euler step of an energy G: q' = q + dt dG/dp(q, p), then p' = p - dt dG/dq(q',
    p).

    q and p are the first and second half of the channels, G(x) = w3 gelu(W2 gelu(W1 x + b1) + b2) +
    b3. A constant does not move anything, so b3 is not a parameter here. With a general G (not
    separable in q and p) the step is not exactly symplectic.

    Attributes:
        weight_in: W1 ``[h, D]``, D even; bias_in: b1 ``[h]``; weight_hidden: W2 ``[h2, h]``;
            bias_hidden: b2 ``[h2]``;
        weight_energy: w3 ``[1, h2]``.
        time_step: dt.
    """

    weight_in: torch.Tensor
    bias_in: torch.Tensor
    weight_hidden: torch.Tensor
    bias_hidden: torch.Tensor
    weight_energy: torch.Tensor
    time_step: float = 0.1

    @classmethod
    def from_module(cls, module: nn.Sequential, time_step: float = 0.1) -> Hamiltonian:
        """The cell of ``nn.Sequential(Linear(D, h), GELU(), Linear(h, h2), GELU(), Linear(h2,
        1))``, sharing its parameters."""
        first, middle, last = _layers("Hamiltonian", module, 5)
        return cls(first.weight, first.bias, middle.weight, middle.bias, last.weight, time_step)

    def parameters(self) -> list[torch.Tensor]:
        return [
            self.weight_in,
            self.bias_in,
            self.weight_hidden,
            self.bias_hidden,
            self.weight_energy,
        ]


@dataclass(frozen=True)
class GRU:
    """z' = LayerNorm(GRUCell(action, z)): gates r, u and candidate n in that order, as in
    torch.nn.GRUCell.

    r, u = sigmoid(W_i a + b_i + W_s z + b_s);  n = tanh(W_i a + b_i + r (W_s z + b_s));  z' =
    LayerNorm((1 - u) n + u z).

    Attributes:
        weight_input: W_i ``[3 D, A]``; weight_state: W_s ``[3 D, D]``; bias_input, bias_state: b_i,
            b_s ``[3 D]``;
        norm_weight, norm_bias: ``[D]``.
        epsilon: added to the variance in the LayerNorm.
    """

    weight_input: torch.Tensor
    weight_state: torch.Tensor
    bias_input: torch.Tensor
    bias_state: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    epsilon: float = 1e-5

    @classmethod
    def from_modules(cls, cell: nn.GRUCell, norm: nn.LayerNorm) -> GRU:
        """The cell of ``norm(cell(action, z))``, sharing the parameters of both modules."""
        return cls(
            cell.weight_ih,
            cell.weight_hh,
            cell.bias_ih,
            cell.bias_hh,
            norm.weight,
            norm.bias,
            norm.eps,
        )

    def parameters(self) -> list[torch.Tensor]:
        return [
            self.weight_input,
            self.weight_state,
            self.bias_input,
            self.bias_state,
            self.norm_weight,
            self.norm_bias,
        ]


Cell = ResidualMLP | Hamiltonian | GRU


def with_parameters(cell: Cell, parameters: list[torch.Tensor]) -> Cell:
    """`cell` with other parameter tensors, in the order of ``cell.parameters()``."""
    names = list(type(cell).__dataclass_fields__)[: len(parameters)]
    changes: dict[str, Any] = dict(zip(names, parameters, strict=True))
    return replace(cell, **changes)


def _layers(cell: str, module: nn.Sequential, count: int) -> list[nn.Linear]:
    """The Linear layers of `module`, in turn with GELU ones."""
    layers = list(module)
    linear = [layer for layer in layers[::2] if isinstance(layer, nn.Linear)]
    if len(layers) != count or len(linear) != len(layers[::2]):
        raise ValueError(
            f"{cell}.from_module: module must be {count} layers, Linear and GELU in turn, got "
            f"{module}."
        )
    for layer in layers[1::2]:
        if not isinstance(layer, nn.GELU) or layer.approximate != "none":
            raise ValueError(
                f"{cell}.from_module: module must have exact nn.GELU layers between its Linear "
                f"layers, got {layer}."
            )
    return linear
