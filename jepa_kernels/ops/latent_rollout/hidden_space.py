"""What the cells that are rolled out in their hidden space share: a residual MLP and a Hamiltonian
only read a = W1 x + b1, so a is what their steps move.

State space pays 2 * in * h to read the state and as much to write it, every step. Hidden space pays
h * h a step once the h x h coupling exists, and that product is worth it only above some number of
row-steps.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from ... import checks
from ...backend import Backend
from ...contract import call_inputs, differentiable
from ..products import add_matmul, affine, matmul
from .readout.parts import ReadoutGradients
from .rollout import Rollout, fail


@call_inputs()
class HiddenRollout(Rollout):
    """The inputs of a rollout in hidden space.

    Attributes:
        halves: parts of the state that move on their own, and half-steps of a step.
    """

    anchor: torch.Tensor | None = differentiable()
    anchor_rows: torch.Tensor | None
    weight_in: torch.Tensor = differentiable()
    bias_in: torch.Tensor = differentiable()

    tables: ClassVar[dict[str, str]] = {**Rollout.tables, "anchor": "anchor_rows"}
    halves: ClassVar[int]

    @property
    def ranges(self) -> list[int]:
        """Channels that the cell reads, as flat ``[start, stop, start, stop, ...]``."""
        raise NotImplementedError

    @property
    def inner(self) -> int:
        """The number of terms of the sums that make the coupling."""
        raise NotImplementedError

    def flop(self, space: str) -> float:
        """FLOP (2 per multiply-add) of the matrix products of one forward pass in the ``hidden`` or
        ``state`` space."""
        raise NotImplementedError

    def base(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the moves are added to, and the rows to take of it."""
        return (self.states, self.rows) if self.anchor is None else (self.anchor, self.anchor_rows)

    def check(self) -> None:
        super().check()
        if self.anchor_rows is not None and self.anchor is not None:
            self.expect("anchor_rows", self.anchor_rows, (self.num_rows,), checks.ID_DTYPES)
        self.expect_rows("anchor", (self.num_rows,))
        if self.matrix_shape("weight_in", "[hidden, channels]")[0] < 1:
            fail("cell.weight_in", "have at least one hidden unit", tuple(self.weight_in.shape))

    def space(self) -> str:
        """``hidden`` or ``state``, the cheaper one: whether building the coupling costs less than
        applying its two factors one after the other."""
        inner, hidden = self.inner, self.widths[0]
        per_application = self.num_rows * (2 * inner * hidden - hidden * hidden)
        # Between readings of the hidden state, so once less than the cell reads.
        applications = self.halves * self.horizon - 1
        return "hidden" if per_application * applications > inner * hidden * hidden else "state"

    def details(self) -> list[str]:
        """Lines for `explain`: the space in which the state is rolled out, and why."""
        hidden, state = self.flop("hidden"), self.flop("state")
        return [
            f"space      {self.space()} on backend torch; hidden {hidden:.3g} FLOP, state "
            f"{state:.3g} FLOP forward; kernels always use hidden"
        ]

    def outputs(self, backend: Backend) -> list[tuple[list[int], torch.dtype]]:
        """The result, the signs of residuals (two bit planes, of backends that keep them instead of
        computing them again), inputs of each half-step, sums."""
        dtype = self.accumulate_dtype
        signs, hidden, sums = [0], [0], [0]
        if self.save:
            rows, width = self.num_rows, self.weight_in.shape[0]
            hidden = [self.halves * self.horizon, rows, width]
            sums = [self.halves, self.kept_steps, rows, width]
            if backend.facts["saves_signs"] and self.output == "errors" and self.exponent == 1.0:
                plane = (self.channels // self.halves + 7) // 8
                signs = [self.halves, self.horizon, rows, 2 * plane]
        return [self.out(), (signs, torch.uint8), (hidden, dtype), (sums, dtype)]


def columns(tensor: torch.Tensor, ranges: list[int], dim: int) -> torch.Tensor:
    """The channels of `ranges` along `dim`: a view for one range, else a copy."""
    if ranges == [0, tensor.shape[dim]]:
        return tensor
    pieces = [tensor.narrow(dim, a, b - a) for a, b in zip(ranges[::2], ranges[1::2], strict=True)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def add_columns(total: torch.Tensor, values: torch.Tensor, ranges: list[int], dim: int) -> None:
    """total[ranges] += values along `dim`, in place."""
    offset = 0
    for a, b in zip(ranges[::2], ranges[1::2], strict=True):
        total.narrow(dim, a, b - a).add_(values.narrow(dim, offset, b - a))
        offset += b - a


def enter(inputs: HiddenRollout) -> torch.Tensor:
    """a_0 = W1 x_0 + b1."""
    seen = columns(inputs.start(), inputs.ranges, 1)
    return affine(seen, inputs.weight_in, inputs.bias_in, inputs.dtype)


def leave(
    inputs: HiddenRollout,
    grad_a: torch.Tensor,
    grad_weight_in: torch.Tensor | None,
    read: ReadoutGradients,
) -> dict[str, torch.Tensor | None]:
    """Gradients of all but the cell's own parameters, from those of a_0, of what else W1 does, and
    of the readout."""
    seen = columns(inputs.start(), inputs.ranges, 1)
    return {
        "states": _grad_states(inputs, grad_a, read.base),
        "targets": read.targets,
        "anchor": None if inputs.anchor is None else read.base,
        "weight_in": add_matmul(grad_weight_in, grad_a.mT, seen, inputs.dtype),
        "bias_in": grad_a.sum(0),
    }


def _grad_states(
    inputs: HiddenRollout, grad_a: torch.Tensor, grad_base: torch.Tensor
) -> torch.Tensor:
    """What reaches the initial states through the hidden layer and, without an anchor, as the base
    of the prediction."""
    operand, total = inputs.dtype, inputs.accumulate_dtype
    anchored, weight_in = inputs.anchor is not None, inputs.weight_in
    if inputs.ranges == [0, inputs.channels] and (operand == total or inputs.rows is None):
        # In one product, rounded once where rows are not added up later.
        grad_a = grad_a.to(operand)
        if anchored:
            return grad_a @ weight_in
        return torch.addmm(grad_base.to(operand), grad_a, weight_in)
    if anchored:
        grad_states = torch.zeros_like(grad_base, dtype=total)
    else:
        grad_states = grad_base.to(total, copy=True)
    add_columns(grad_states, matmul(grad_a, weight_in, operand), inputs.ranges, 1)
    return grad_states
