"""The teacher's side of an adamw_ema call: what ema_update_ takes, without the sources, which are
the updated parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class TeacherLists:
    """Targets of the first ``len(targets)`` parameters and how they follow them; every field as in
    `jepa_kernels.ema_update_`."""

    targets: Sequence[torch.Tensor] = field(default_factory=list)
    momentum: float | torch.Tensor = 1.0
    copies: Sequence[torch.Tensor] | None = None
    rounding: str = "nearest"
    compensations: Sequence[torch.Tensor] | None = None
    seed: int | torch.Tensor | None = None
