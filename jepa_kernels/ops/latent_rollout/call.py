"""What a backend may look at to accept or refuse a rollout: shapes, dtypes, devices and flags; and
what the rollout costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...checks import dtype_name
from . import cost


@dataclass(frozen=True)
class Call:
    """One call as `resolve` sees it."""

    device_type: str
    dtype: torch.dtype
    cell: str  # residual_mlp, hamiltonian or gru
    num_rows: int
    channels: int
    in_channels: int
    hidden: tuple[int, ...]  # widths of the hidden layers; of the state for a GRU
    action_channels: int
    horizon: int
    output: str  # states, last or errors
    needs_grad: bool

    def size_class(self) -> str:
        """``wide`` where the state has at least 512 channels, else ``narrow``; then the cell and
        what is returned."""
        return f"{self.cell}/{self.output}/{'wide' if self.channels >= 512 else 'narrow'}"

    def describe(self) -> str:
        parts = [
            f"states [{self.num_rows}, {self.channels}] {dtype_name(self.dtype)} "
            f"{self.device_type}",
            f"{self.cell} hidden {' x '.join(map(str, self.hidden))}",
            f"horizon {self.horizon}, returns {self.output}",
        ]
        if self.needs_grad:
            parts.append("gradients needed")
        return "; ".join(parts)

    def details(self) -> list[str]:
        """Lines for `explain`: the space in which the state is rolled out, and why."""
        if self.cell == "gru":
            return ["space      state (a GRU moves its whole state)"]
        hidden, state = self.flop("hidden"), self.flop("state")
        space = self.space()
        return [
            f"space      {space} on backend torch; hidden {hidden:.3g} FLOP, state {state:.3g} "
            "FLOP forward; kernels always use hidden"
        ]

    def space(self) -> str:
        """``hidden`` or ``state``: the cheaper one for this size."""
        return (
            "hidden"
            if cost.hidden_is_cheaper(
                self.cell, self.num_rows, self.in_channels, self.hidden[0], self.horizon
            )
            else "state"
        )

    def flop(self, space: str) -> float:
        """FLOP of the matrix products of one forward pass in `space`."""
        return cost.flop(
            self.cell,
            space,
            self.num_rows,
            self.channels,
            self.in_channels,
            self.hidden,
            self.horizon,
            self.output,
        )


def dtype_reasons(call: Call, allowed: tuple[torch.dtype, ...]) -> list[str]:
    if call.dtype not in allowed:
        return [
            f"dtype must be {' or '.join(dtype_name(d) for d in allowed)}, got "
            f"{dtype_name(call.dtype)}"
        ]
    return []
