"""The readout in C++ and CUDA C++, by the device of the tensors: a product with the base, the bias
and, for errors, the reduction fused into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .... import native
from .. import native_ops
from ..arithmetic import inside
from ..native_ops import floats
from .parts import Part

if TYPE_CHECKING:
    from ..hidden_space import HiddenRollout


class NativeReadout:
    """See `Readout`."""

    cheaper_space = False

    def __init__(self, saves_signs: bool) -> None:
        self.saves_signs = saves_signs

    def readout(
        self, inputs: HiddenRollout, part: Part, sums: torch.Tensor, out: torch.Tensor
    ) -> None:
        step = 1 if inputs.keeps_all else inputs.horizon
        read = self._read(inputs, part, sums)
        native_ops.OPS.latent_rollout_readout(*read, step, out, native.isa())

    def errors(
        self, inputs: HiddenRollout, part: Part, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert inputs.targets is not None  # there are errors
        save = self.saves_signs and inputs.save and inputs.exponent == 1.0
        values, signs = native_ops.OPS.latent_rollout_errors(
            *self._read(inputs, part, sums),
            *self._targets(part, inputs.targets, inputs.target_rows),
            inputs.exponent,
            save,
            native.isa(),
        )
        return values, signs if save else None

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
        targets, rows = inputs.target(k)
        gradient: torch.Tensor = native_ops.OPS.latent_rollout_errors_gradient(
            *self._read(inputs, part, sums[None]),
            *self._targets(part, targets[None] if rows is None else targets, rows),
            inputs.exponent,
            signs,
            k + 1,
            grad_errors[None].contiguous(),
            grad_base,
            native.isa(),
        )[0]
        return gradient

    @staticmethod
    def _read(
        inputs: HiddenRollout, part: Part, sums: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        base, rows = inputs.base()
        return sums, part.weight, floats(part.bias), base[:, part.window], inside(rows, base)

    @staticmethod
    def _targets(
        part: Part, targets: torch.Tensor, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return targets[..., part.window], inside(rows, targets)
