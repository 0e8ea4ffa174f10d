"""Which token of all clips each row of the output is, and the reverse. Nothing here reads a value
on the host."""

from __future__ import annotations

import torch

from .inputs import Inputs


def token_rows(inputs: Inputs) -> torch.Tensor:
    """int64 ``[rows]``: clip * N + id, in the order of the ids.

    An id outside the grid, which only a GPU lets through, counts as the nearest one inside, so that
    no kernel reads foreign memory.
    """
    ids = inputs.ids.to(torch.int64).clamp(0, inputs.tokens - 1)
    if inputs.cu_seqlens is None:
        clip = torch.arange(inputs.batch, device=ids.device)[:, None]
        return (clip * inputs.tokens + ids).flatten()
    if inputs.count == 0:
        return ids
    place = torch.arange(inputs.count, device=ids.device)
    ends = inputs.cu_seqlens[1:].to(torch.int64)
    sequence = torch.searchsorted(ends, place, right=True)
    return sequence.remainder(inputs.batch) * inputs.tokens + ids


def rows_by_token(rows: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in the order of their tokens, and where those of each of all `tokens` begin: int64
    ``[rows]`` and ``[tokens + 1]``. A token may have any number of rows."""
    ordered, order = torch.sort(rows, stable=True)
    bounds = torch.arange(tokens + 1, device=rows.device)
    return order, torch.searchsorted(ordered, bounds)
