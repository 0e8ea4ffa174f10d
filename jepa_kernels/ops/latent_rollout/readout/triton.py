"""The readout in Triton: one kernel that writes predictions, compares or differentiates them, so
that a loss never writes one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..arithmetic import inside
from ..triton_launch import COLUMNS, ROWS, options, terms
from .parts import Part

if TYPE_CHECKING:
    from ..hidden_space import HiddenRollout

STATES, ERRORS, GRADIENT = range(3)  # of readout_kernel


class TritonReadout:
    """See `Readout`."""

    saves_signs = False
    cheaper_space = False

    def readout(
        self, inputs: HiddenRollout, part: Part, sums: torch.Tensor, out: torch.Tensor
    ) -> None:
        step = 1 if inputs.keeps_all else inputs.horizon
        self._launch(inputs, part, sums, step, STATES, out=out)

    def errors(
        self, inputs: HiddenRollout, part: Part, sums: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        errors = sums.new_empty(sums.shape[:2])
        targets = inputs.targets, inputs.target_rows
        self._launch(inputs, part, sums, 1, ERRORS, targets=targets, errors=errors)
        return errors, None

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
        grad = sums.new_empty((sums.shape[0], part.stop - part.start))
        gradient, targets = (grad_errors.contiguous(), grad, grad_base), inputs.target(k)
        self._launch(inputs, part, sums[None], k + 1, GRADIENT, targets=targets, gradient=gradient)
        return grad

    @staticmethod
    def _launch(
        inputs: HiddenRollout,
        part: Part,
        sums: torch.Tensor,
        first_step: int,
        mode: int,
        *,
        targets: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        out: torch.Tensor | None = None,
        errors: torch.Tensor | None = None,
        gradient: tuple[torch.Tensor | None, ...] = (None, None, None),
    ) -> None:
        from .triton_kernels import readout_kernel

        steps, count, hidden = sums.shape
        if count == 0:
            return
        base, rows = inputs.base()
        base, rows = base[:, part.window], inside(rows, base)
        compared, target_rows = targets
        if compared is not None:
            target_rows = inside(target_rows, compared)
            compared = compared[..., part.window]
        grad_errors, grad, grad_base = gradient
        readout_kernel[(-(-count // ROWS), steps)](
            sums,
            part.weight,
            None if part.bias is None else part.bias.float(),
            base,
            rows,
            compared,
            target_rows,
            out,
            errors,
            grad_errors,
            grad,
            grad_base,
            count,
            first_step,
            *part.weight.stride(),
            base.stride(0),
            compared.stride(0) if compared is not None and compared.dim() == 3 else 0,
            0 if compared is None else compared.stride(-2),
            *((0, 0) if out is None else out.stride()[:2]),
            0 if grad_base is None else grad_base.stride(0),
            hidden,
            part.stop - part.start,
            MODE=mode,
            EXPONENT=float(inputs.exponent),
            BM=ROWS,
            BN=COLUMNS,
            BK=terms(part.weight.dtype),
            **options(4),
        )
