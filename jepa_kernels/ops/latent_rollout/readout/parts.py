"""From sums of hidden states to predictions or errors, and back: what a residual MLP and a
Hamiltonian share besides their hidden space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from ...products import add_matmul, matmul_into
from ..arithmetic import fresh

if TYPE_CHECKING:
    from ..hidden_space import HiddenRollout


@dataclass(frozen=True)
class Part:
    """A range of channels whose moves are ``sums @ weight + k bias``: all of them for a residual
    MLP, q and p for a Hamiltonian."""

    start: int
    stop: int
    weight: torch.Tensor  # [h, stop - start]
    bias: torch.Tensor | None

    @property
    def window(self) -> slice:
        return slice(self.start, self.stop)


class Readout(Protocol):
    """What a backend computes to read predictions ``y_k = base + sums_k @ weight + k bias`` of one
    part. `sums` is ``[kept steps, rows, h]`` in the accumulation dtype.

    Attributes:
        saves_signs: whether `errors` can return the signs of residuals for `residual_gradient`.
        cheaper_space: whether the coupling may stay two factors where that costs less; kernels
            take it as one matrix.
    """

    saves_signs: bool
    cheaper_space: bool

    def readout(
        self, inputs: HiddenRollout, part: Part, sums: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Writes the predictions ``[kept steps, rows, channels]`` of the part to `out`."""

    def errors(
        self, inputs: HiddenRollout, part: Part, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The errors of the part against the targets ``[steps, rows]``, and signs or None."""

    def residual_gradient(
        self,
        inputs: HiddenRollout,
        part: Part,
        k: int,
        sums: torch.Tensor,
        signs: torch.Tensor | None,
        grad_errors: torch.Tensor,
        grad_base: torch.Tensor,
    ) -> torch.Tensor:
        """The gradient of the predictions of step k (from 0) ``[rows, channels]``, also added to
        grad_base; sums, signs and grad_errors are those of the step."""


class ReadoutGradients(NamedTuple):
    """Gradients of what a readout reads, one row per rollout row. Those of the base are in the
    accumulation dtype or, where nothing is added to them any more, in that of the inputs."""

    sums: torch.Tensor  # [parts, kept steps, rows, h]
    base: torch.Tensor  # [rows, D]
    targets: torch.Tensor | None  # [horizon, rows, D]
    parts: list[tuple[torch.Tensor, torch.Tensor | None]]  # weight and bias of each part


def read_out(
    inputs: HiddenRollout, kernels: Readout, parts: list[Part], sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op's result, and the signs of its residuals (empty where not kept)."""
    signs = torch.empty(0, dtype=torch.uint8, device=sums.device)
    if inputs.output == "errors":
        found = [kernels.errors(inputs, part, sums[i]) for i, part in enumerate(parts)]
        values, kept = zip(*found, strict=True)
        if inputs.save and kept[0] is not None:
            signs = torch.stack(kept)
        return values[0] if len(values) == 1 else values[0] + values[1], signs
    out = fresh((inputs.kept_steps, inputs.num_rows, inputs.channels), inputs.dtype, sums.device)
    for i, part in enumerate(parts):
        kernels.readout(inputs, part, sums[i], out[..., part.window])
    return out[0] if inputs.output == "last" else out, signs


def read_out_backward(
    inputs: HiddenRollout,
    kernels: Readout,
    parts: list[Part],
    saved: list[torch.Tensor],
    grad_out: torch.Tensor,
    needs_targets: bool,
) -> ReadoutGradients:
    """The transpose of `read_out`."""
    signs, _, sums = saved
    operand, total = inputs.dtype, inputs.accumulate_dtype
    shape = (inputs.num_rows, inputs.channels)
    grad_targets = None
    if inputs.output == "errors":
        grad_base = torch.zeros(shape, dtype=total, device=sums.device)
        if needs_targets:
            grad_targets = fresh((inputs.horizon, *shape), operand, sums.device)
    else:
        grad_out = grad_out.to(operand)
        grad_out = grad_out[None] if inputs.output == "last" else grad_out
        # Sums of 16-bit numbers are formed in float32 and rounded once; asked for a float32 result,
        # torch would widen every number first.
        grad_base = grad_out[0] if inputs.kept_steps == 1 else grad_out.sum(0)
    read = ReadoutGradients(fresh(sums.shape, total, sums.device), grad_base, grad_targets, [])
    for i, part in enumerate(parts):
        planes = signs[i] if signs.numel() else None
        read.parts.append(
            _part_backward(inputs, kernels, part, sums[i], planes, grad_out, read, read.sums[i])
        )
    return read


def _part_backward(
    inputs: HiddenRollout,
    kernels: Readout,
    part: Part,
    sums: torch.Tensor,
    signs: torch.Tensor | None,
    grad_out: torch.Tensor,
    read: ReadoutGradients,
    grad_sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a part's weight and bias; fills grad_sums and the targets', and adds an error's
    to the base's."""
    grad_weight, grad_bias = None, None
    # The product is formed in the memory order of the parameter, which a residual MLP's part reads
    # transposed.
    transposed = part.weight.stride(0) == 1
    for k in range(sums.shape[0]):
        if inputs.output == "errors":
            given = None if signs is None else signs[k]
            base = read.base[:, part.window]
            grad = kernels.residual_gradient(inputs, part, k, sums[k], given, grad_out[k], base)
            if read.targets is not None:
                torch.mul(grad, -1, out=read.targets[k][:, part.window])
        else:
            grad = grad_out[k][:, part.window]
        matmul_into(grad_sums[k], grad, part.weight.mT, inputs.dtype)
        left, right = (grad, sums[k]) if transposed else (sums[k], grad)
        grad_weight = add_matmul(grad_weight, left.mT, right, inputs.dtype)
        if part.bias is not None:
            step = k + 1 if inputs.keeps_all else inputs.horizon
            summed = grad.sum(0).to(grad_sums.dtype)
            if grad_bias is None:
                grad_bias = summed.mul_(step)
            else:
                grad_bias.add_(summed, alpha=step)
    assert grad_weight is not None
    return grad_weight.mT if transposed else grad_weight, grad_bias
