"""How the specifications step a state, as the equations are written, with ordinary autograd and any
float dtype.

They share nothing with the kernels: no hidden-space algebra, no hand-written derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def stepped(
    inputs: Any, step: Callable[[Any, torch.Tensor, int], torch.Tensor]
) -> tuple[torch.Tensor]:
    """The result of a rollout by ``step(inputs, state, k)``."""
    start, anchor = inputs.start(), getattr(inputs, "anchor", None)
    if anchor is not None and inputs.anchor_rows is not None:
        anchor = anchor[inputs.anchor_rows]
    state, kept = start, []
    for k in range(inputs.horizon):
        state = step(inputs, state, k)
        y = state if anchor is None else anchor + (state - start)
        kept.append(_error(inputs, y, k) if inputs.output == "errors" else y)
    out = kept[-1] if inputs.output == "last" else torch.stack(kept)
    return (out.to(inputs.out()[1]),)


def _error(inputs: Any, prediction: torch.Tensor, k: int) -> torch.Tensor:
    """e ``[rows]``: mean over channels of ``|y - target| ** exponent / exponent``; where the state
    has two halves the sum of their means."""
    targets, rows = inputs.target(k)
    target = targets if rows is None else targets[rows]
    residual = (prediction - target).abs() ** inputs.exponent / inputs.exponent
    return residual.mean(-1) * getattr(inputs, "halves", 1)
