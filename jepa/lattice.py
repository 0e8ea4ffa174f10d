"""Index lists over the (T, H, W) token lattice of a packed batch, in NumPy.

A sequence is one (mask set, sample) pair; token id = t*H*W + y*W + x. Every function is a whole-array formula: no loop over
sequences or tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# Larger than any squared distance a lattice of at most 2**15 sites a side can hold, and small enough that adding an offset cannot overflow int64.
_FAR = np.int64(1) << 40


def presence_table(ids: Int64, sequence: Int64, num_sequences: int, num_tokens: int) -> Int64:
    """[S, N] packed row of each token, -1 where the sequence has not got it."""
    table = np.full(num_sequences * num_tokens, -1, dtype=np.int64)
    table[sequence * num_tokens + ids] = np.arange(len(ids), dtype=np.int64)
    return table.reshape(num_sequences, num_tokens)


def squared_distance_to(present: NDArray[np.bool_]) -> Int64:
    """Squared Euclidean distance of every site of [S, T, H, W] to the nearest True of its sequence; >= 2**39 where there is none.

    The square separates over the axes, so three one-dimensional min-plus passes are exact: O(sites * (T + H + W)), where
    comparing all pairs of tokens costs O(sites * targets).
    """
    field = np.where(present, np.int64(0), _FAR)
    for axis in (1, 2, 3):
        size = field.shape[axis]
        offset = np.arange(size, dtype=np.int64)
        gap = (offset[:, None] - offset[None, :]) ** 2
        moved = np.moveaxis(field, axis, -1)
        field = np.moveaxis((moved[..., None, :] + gap).min(axis=-1), -1, axis)
    return np.ascontiguousarray(field)


def temporal_pairs(table: Int64, grid: tuple[int, int, int], horizon: int) -> tuple[Int64, Int64, Int64]:
    """Sites present at t, t+1, .. t+horizon: packed rows [P, horizon+1], token ids [P, horizon+1], sequence [P].

    Ordered by sequence, then t, then site. Empty when the grid has no horizon+1 time steps.
    """
    steps = grid[0]
    sites = grid[1] * grid[2]
    starts = steps - horizon
    if starts <= 0:
        empty = np.zeros((0, horizon + 1), dtype=np.int64)
        return empty, empty.copy(), np.zeros(0, dtype=np.int64)
    by_time = table.reshape(-1, steps, sites)
    windows = np.stack([by_time[:, k : k + starts] for k in range(horizon + 1)], axis=-1)
    sequence, start, site = np.nonzero((windows >= 0).all(axis=-1))
    first = start * sites + site
    return windows[sequence, start, site], first[:, None] + sites * np.arange(horizon + 1), sequence


def full_columns(table: Int64, grid: tuple[int, int, int]) -> tuple[Int64, Int64, Int64]:
    """Sites present at every time step: packed rows [C, T], token ids [C, T], sequence [C]; ordered by sequence, then site."""
    steps = grid[0]
    sites = grid[1] * grid[2]
    by_time = table.reshape(-1, steps, sites)
    sequence, site = np.nonzero((by_time >= 0).all(axis=1))
    return by_time[sequence, :, site], site[:, None] + sites * np.arange(steps), sequence
