"""Index lists over the (T, H, W) token lattice of a packed batch, in NumPy.

A sequence is one (mask set, sample) pair; token id = t*H*W + y*W + x. Every function is a
whole-array formula: no loop over sequences or tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# The longest side of a grid: squared distances then stay below _FAR / 2, and adding one to _FAR
# stays within int32 in the host code.
LONGEST_SIDE = 8192
_FAR = np.int64(1) << 29


def presence_table(ids: Int64, sequence: Int64, num_sequences: int, num_tokens: int) -> Int64:
    """[S, N] packed row of each token, -1 where the sequence has not got it."""
    table = np.full(num_sequences * num_tokens, -1, dtype=np.int64)
    table[sequence * num_tokens + ids] = np.arange(len(ids), dtype=np.int64)
    return table.reshape(num_sequences, num_tokens)


def nearest_distance(
    targets: Int64, ids: Int64, sequence: Int64, grid: tuple[int, int, int]
) -> NDArray[np.float32]:
    """[Nc] sqrt of the Euclidean lattice distance of each token to the nearest target of its
    sequence; infinite where there is none.

    `targets` is the [S, N] presence table. The squared distance separates over the axes, so three
    one-dimensional min-plus passes are exact: O(sites * (T + H + W)), where comparing all pairs of
    tokens costs O(sites * targets).
    """
    field = np.where(targets.reshape(-1, *grid) >= 0, np.int64(0), _FAR)
    for axis in (1, 2, 3):
        offset = np.arange(field.shape[axis], dtype=np.int64)
        gap = (offset[:, None] - offset[None, :]) ** 2
        moved = np.moveaxis(field, axis, -1)
        field = np.moveaxis((moved[..., None, :] + gap).min(axis=-1), -1, axis)
    squared = field.reshape(len(targets), -1)[sequence, ids].astype(np.float64)
    squared[squared >= _FAR / 2] = np.inf
    return np.sqrt(np.sqrt(squared)).astype(np.float32)


def temporal_pairs(
    table: Int64, grid: tuple[int, int, int], horizon: int
) -> tuple[Int64, Int64, Int64]:
    """Sites present at t, t+1, .. t+horizon: packed rows [P, horizon+1], token ids [P, horizon+1],
    sequence [P].

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
    """Sites present at every time step: packed rows [C, T], token ids [C, T], sequence [C]; ordered
    by sequence, then site."""
    steps = grid[0]
    sites = grid[1] * grid[2]
    by_time = table.reshape(-1, steps, sites)
    sequence, site = np.nonzero((by_time >= 0).all(axis=1))
    return by_time[sequence, :, site], site[:, None] + sites * np.arange(steps), sequence
