"""The contract of ema_update: its backends in the order `auto` tries them, its schema, its checks.

There is nothing to differentiate: the op runs under no_grad and writes in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...contract import InPlace
from ..ema import lists, shards
from .inputs import NAME, Inputs, check, check_values, distinct, example

PRIORITY = ("cuda", "triton", "cpu", "torch", "reference")


def prepare(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    *,
    copies: Sequence[torch.Tensor] | None = None,
    rounding: str = "nearest",
    compensations: Sequence[torch.Tensor] | None = None,
    seed: int | torch.Tensor | None = None,
) -> Inputs:
    """The checked inputs of the public function's arguments (values of plain numbers only)."""
    named = {
        "targets": targets,
        "sources": sources,
        "copies": copies,
        "compensations": compensations,
    }
    for argument, values in named.items():
        lists.check_list(NAME, argument, values, optional=argument in ("copies", "compensations"))
    lists.check_given(NAME, rounding, compensations, seed)
    local = shards.local(NAME, named)
    device = local["targets"][0].device if local["targets"] else torch.device("cpu")
    lists.check_momentum(NAME, momentum, device)
    inputs = Inputs(
        local["targets"],
        local["sources"],
        lists.momentum_tensor(momentum),
        local.get("copies", []),
        local.get("compensations", []),
        lists.seed_tensor(NAME, seed, device),
        rounding,
    )
    check(inputs)
    return inputs


OP = InPlace(
    "ema_update",
    __package__,
    PRIORITY,
    prepare,
    {
        "large": example([(1024, 1024)] * 4),
        "small": example([(128, 128)] * 32),
        "tiny": example([(16, 16)] * 60),
    },
    inputs=Inputs,
    check=check,
    check_values=check_values,
    distinct=distinct,
)


def update_plain(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    backend: str | None,
) -> bool:
    """The usual call, targets and sources alone, without checks in Python; see
    `InPlace.run_plain`."""
    if (
        type(momentum) is not float
        or not 0.0 <= momentum <= 1.0
        or not isinstance(targets, list)
        or not isinstance(sources, list)
        or not targets
    ):
        return False
    number: Any = momentum  # a `plain` takes the number itself
    inputs = Inputs(targets, sources, number, [], [], None, "nearest")
    return OP.run_plain(inputs, targets + sources, backend)
