"""The tensor lists of one call, and the flat arrays that kernels walk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from ..ema_update.memory import Flat

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Lists:
    """`targets`, `copies` and `compensations` belong to the first parameters; the others have one
    entry for each parameter."""

    params: Tensors
    grads: Tensors
    exp_avgs: Tensors
    exp_avg_sqs: Tensors
    steps: Tensors
    targets: Tensors
    copies: Tensors = ()
    compensations: Tensors = ()

    def written(self) -> list[torch.Tensor]:
        return [
            *self.params,
            *self.exp_avgs,
            *self.exp_avg_sqs,
            *self.targets,
            *self.copies,
            *self.compensations,
        ]

    @contextlib.contextmanager
    def flat(self, *, row_major: bool) -> Iterator[Lists]:
        """The same lists as arrays of one memory order; what had to be copied is copied back at the
        end."""
        written = ("params", "exp_avgs", "exp_avg_sqs", "targets", "copies", "compensations")
        arrays = Flat(
            written=tuple(getattr(self, name) for name in written),
            read=(self.grads,),
            row_major=row_major,
        )
        with arrays as values:
            yield Lists(steps=self.steps, **dict(zip((*written, "grads"), values, strict=True)))


# Everything but the step numbers, which are whole on every rank.
SHARDED = tuple(f.name for f in fields(Lists) if f.name != "steps")
