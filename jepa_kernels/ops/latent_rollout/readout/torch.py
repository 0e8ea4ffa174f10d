"""The readout in eager PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...products import matmul
from ..arithmetic import power_mean, power_mean_gradient, take
from .parts import Part

if TYPE_CHECKING:
    from ..hidden_space import HiddenRollout


class EagerReadout:
    """See `Readout`."""

    saves_signs = False
    cheaper_space = True

    def readout(
        self, inputs: HiddenRollout, part: Part, sums: torch.Tensor, out: torch.Tensor
    ) -> None:
        base = self._base(inputs, part)
        for k in range(sums.shape[0]):
            step = k + 1 if inputs.keeps_all else inputs.horizon
            self._predict(inputs, part, base, sums[k], step, out[k])

    def errors(
        self, inputs: HiddenRollout, part: Part, sums: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        base = self._base(inputs, part)
        residuals = (self._residual(inputs, part, base, sums[k], k) for k in range(sums.shape[0]))
        return torch.stack([power_mean(r, inputs.exponent) for r in residuals]), None

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
        residual = self._residual(inputs, part, self._base(inputs, part), sums, k)
        gradient = power_mean_gradient(residual, grad_errors, inputs.exponent)
        grad_base += gradient
        return gradient

    @staticmethod
    def _base(inputs: HiddenRollout, part: Part) -> torch.Tensor:
        return take(*inputs.base(), part.start, part.stop)

    def _residual(
        self,
        inputs: HiddenRollout,
        part: Part,
        base: torch.Tensor,
        sums: torch.Tensor,
        k: int,
    ) -> torch.Tensor:
        target = take(*inputs.target(k), part.start, part.stop)
        return self._predict(inputs, part, base, sums, k + 1) - target

    def _predict(
        self,
        inputs: HiddenRollout,
        part: Part,
        base: torch.Tensor,
        sums: torch.Tensor,
        step: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The prediction of one step, in `out` where given."""
        if sums.dtype != inputs.dtype:
            moved = matmul(sums, part.weight, inputs.dtype).add_(base)
            moved = moved if part.bias is None else moved.add_(part.bias, alpha=step)
            return moved if out is None else out.copy_(moved)
        if part.bias is None:
            return torch.mm(sums, part.weight, out=out).add_(base)
        bias = part.bias if step == 1 else part.bias * step
        return torch.addmm(bias, sums, part.weight, out=out).add_(base)
