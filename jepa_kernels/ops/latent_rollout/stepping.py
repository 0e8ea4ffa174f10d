"""How the specifications step a state, as the equations are written, with ordinary autograd and any
float dtype.

They share nothing with the kernels: no hidden-space algebra, no hand-written derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .rollout import Rollout

_Inputs = TypeVar("_Inputs", bound=Rollout)


def stepped(
    inputs: _Inputs, step: Callable[[_Inputs, torch.Tensor, int], torch.Tensor]
) -> tuple[torch.Tensor]:
    """The result of a rollout by ``step(inputs, state, k)``."""
    start = inputs.start()
    anchor: torch.Tensor | None = getattr(inputs, "anchor", None)
    anchor_rows: torch.Tensor | None = getattr(inputs, "anchor_rows", None)
    if anchor is not None and anchor_rows is not None:
        anchor = anchor[anchor_rows]
    state, predictions = start, []
    for k in range(inputs.horizon):
        state = step(inputs, state, k)
        predictions.append(state if anchor is None else anchor + (state - start))
    if inputs.output == "errors":
        predictions = [_error(inputs, y, k) for k, y in enumerate(predictions)]
    out = torch.stack(predictions) if inputs.keeps_all else predictions[-1]
    return (out.to(inputs.out()[1]),)


def _error(inputs: Rollout, prediction: torch.Tensor, k: int) -> torch.Tensor:
    """e ``[rows]``: mean over channels of ``|y - target| ** exponent / exponent``; where the state
    has two halves the sum of their means."""
    targets, rows = inputs.target(k)
    target = targets if rows is None else targets[rows]
    residual = (prediction - target).abs() ** inputs.exponent / inputs.exponent
    halves: int = getattr(inputs, "halves", 1)
    return residual.mean(-1) * halves
