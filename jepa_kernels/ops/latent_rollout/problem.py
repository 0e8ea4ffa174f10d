"""One rollout as the kernel backends get it: tensors, cell kind and numbers, already checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """The inputs of the op. `save` asks forward for what backward needs; `scalar` is dt of a
    Hamiltonian, epsilon of a GRU."""

    states: torch.Tensor
    rows: torch.Tensor | None
    parameters: list[torch.Tensor]
    actions: torch.Tensor | None
    anchor: torch.Tensor | None
    anchor_rows: torch.Tensor | None
    targets: torch.Tensor | None
    target_rows: torch.Tensor | None
    cell: str
    in_channels: list[int]
    scalar: float
    horizon: int
    output: str
    exponent: float
    save: bool

    @property
    def num_rows(self) -> int:
        return self.states.shape[0] if self.rows is None else self.rows.shape[0]

    @property
    def channels(self) -> int:
        return self.states.shape[1]

    @property
    def kept_steps(self) -> int:
        """Steps whose prediction is returned or compared."""
        return 1 if self.output == "last" else self.horizon

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.float64 if self.states.dtype == torch.float64 else torch.float32

    def start(self) -> torch.Tensor:
        """The initial states ``[rows, D]``."""
        return self.states if self.rows is None else self.states.index_select(0, self.rows)

    def base(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the moves are added to, and the rows to take of it."""
        return (self.states, self.rows) if self.anchor is None else (self.anchor, self.anchor_rows)

    def target(self, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The targets of step k (from 0), and the rows to take of them."""
        return (
            (self.targets[k], None)
            if self.target_rows is None
            else (self.targets, self.target_rows[k])
        )

    def upcast(self) -> Problem:
        """The same problem in float32, for processors without fast 16-bit products."""

        def up(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.float()

        return replace(
            self,
            states=self.states.float(),
            parameters=[p.float() for p in self.parameters],
            actions=up(self.actions),
            anchor=up(self.anchor),
            targets=up(self.targets),
        )


def saved_shapes(problem: Problem, signs: bool) -> tuple[list[int], list[int], list[int]]:
    """Shapes of the three tensors that forward keeps for backward: residual signs, inputs of each
    half-step (GRU: gates), sums (states).

    `signs` tells whether the backend keeps the sign of each residual (two bit planes) instead of
    computing it again.
    """
    if not problem.save:
        return [0], [0], [0]
    rows, steps, kept = problem.num_rows, problem.horizon, problem.kept_steps
    if problem.cell == "gru":
        return [0], [steps, rows, 4 * problem.channels], [steps, rows, problem.channels]
    width = problem.parameters[0].shape[0]
    parts = 2 if problem.cell == "hamiltonian" else 1
    plane = (problem.channels // parts + 7) // 8
    sign_shape = (
        [parts, steps, rows, 2 * plane]
        if signs and problem.output == "errors" and problem.exponent == 1.0
        else [0]
    )
    return sign_shape, [parts * steps, rows, width], [parts, kept, rows, width]
