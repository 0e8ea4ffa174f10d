"""The readout in C++ and CUDA C++, by the device of the tensors: a product with the base, the bias
and, for errors, the reduction fused into it."""

from __future__ import annotations

from .... import native
from .. import native_ops
from ..arithmetic import inside
from ..native_ops import floats


class NativeReadout:
    """See `Readout`."""

    cheaper_space = False

    def __init__(self, saves_signs: bool) -> None:
        self.saves_signs = saves_signs

    def readout(self, inputs, part, sums, out):
        step = 1 if inputs.keeps_all else inputs.horizon
        read = self._read(inputs, part, sums)
        native_ops.OPS.latent_rollout_readout(*read, step, out, native.isa())

    def errors(self, inputs, part, sums):
        save = self.saves_signs and inputs.save and inputs.exponent == 1.0
        values, signs = native_ops.OPS.latent_rollout_errors(
            *self._read(inputs, part, sums),
            *self._targets(part, inputs.targets, inputs.target_rows),
            inputs.exponent,
            save,
            native.isa(),
        )
        return values, signs if save else None

    def residual_gradient(self, inputs, part, k, sums, signs, grad_errors, grad_base):
        targets, rows = inputs.target(k)
        return native_ops.OPS.latent_rollout_errors_gradient(
            *self._read(inputs, part, sums[None]),
            *self._targets(part, targets[None] if rows is None else targets, rows),
            inputs.exponent,
            signs,
            k + 1,
            grad_errors[None].contiguous(),
            grad_base,
            native.isa(),
        )[0]

    @staticmethod
    def _read(inputs, part, sums):
        base, rows = inputs.base()
        return sums, part.weight, floats(part.bias), base[:, part.window], inside(rows, base)

    @staticmethod
    def _targets(part, targets, rows):
        return targets[..., part.window], inside(rows, targets)
