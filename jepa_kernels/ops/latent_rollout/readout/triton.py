"""The readout in Triton: one kernel that writes predictions, compares or differentiates them, so
that a loss never writes one."""

from __future__ import annotations

from ..arithmetic import inside
from ..triton_launch import COLUMNS, ROWS, options, terms

STATES, ERRORS, GRADIENT = range(3)  # of readout_kernel


class TritonReadout:
    """See `Readout`."""

    saves_signs = False
    cheaper_space = False

    def readout(self, inputs, part, sums, out):
        step = 1 if inputs.keeps_all else inputs.horizon
        self._launch(inputs, part, sums, step, STATES, out=out)

    def errors(self, inputs, part, sums):
        errors = sums.new_empty(sums.shape[:2])
        targets = inputs.targets, inputs.target_rows
        self._launch(inputs, part, sums, 1, ERRORS, targets=targets, errors=errors)
        return errors, None

    def residual_gradient(self, inputs, part, k, sums, signs, grad_errors, grad_base):
        grad = sums.new_empty((sums.shape[0], part.stop - part.start))
        gradient, targets = (grad_errors.contiguous(), grad, grad_base), inputs.target(k)
        how = {"targets": targets, "gradient": gradient}
        self._launch(inputs, part, sums[None], k + 1, GRADIENT, **how)
        return grad

    @staticmethod
    def _launch(
        inputs,
        part,
        sums,
        first_step,
        mode,
        *,
        targets=(None, None),
        out=None,
        errors=None,
        gradient=(None, None, None),
    ):
        from .triton_kernels import readout_kernel

        steps, count, hidden = sums.shape
        if count == 0:
            return
        base, rows = inputs.base()
        base, rows = base[:, part.window], inside(rows, base)
        targets, target_rows = targets
        if targets is not None:
            target_rows = inside(target_rows, targets)
            targets = targets[..., part.window]
        grad_errors, grad, grad_base = gradient
        readout_kernel[(-(-count // ROWS), steps)](
            sums,
            part.weight,
            None if part.bias is None else part.bias.float(),
            base,
            rows,
            targets,
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
            targets.stride(0) if targets is not None and targets.dim() == 3 else 0,
            0 if targets is None else targets.stride(-2),
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
