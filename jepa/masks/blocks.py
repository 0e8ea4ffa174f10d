"""Block sampling in NumPy: the specification of csrc/host/masks.cpp, which gives the same masks bit
for bit."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from jepa.counter_rng import Stream, stream_id, uniforms
from jepa.masks.motion import block_scores, origin_weights
from jepa.masks.policy import MaskPolicy, MaskSet

# Numbers one block may use: a uniform one takes (start, top, left), a motion-guided one (kind,
# position).
DRAWS_PER_BLOCK = 4
# The sample key of numbers that a whole step shares.
SHARED_SAMPLE = 2**32 - 1


def block_size(
    mask_set: MaskSet, grid: tuple[int, int, int], draws: NDArray[np.float64]
) -> tuple[int, int, int]:
    """(t, h, w) in tokens from three numbers in [0, 1): share of time, share of a frame, height /
    width; at least one token each way."""
    time_steps, height, width = grid
    shares = [
        low + float(draw) * (high - low)
        for draw, (low, high) in zip(
            draws,
            (mask_set.temporal_scale, mask_set.spatial_scale, mask_set.aspect_ratio),
            strict=True,
        )
    ]
    area = float(max(1, int(height * width * shares[1])))
    t = max(1, int(time_steps * shares[0]))
    h = math.floor(math.sqrt(area * shares[2]) + 0.5)
    w = math.floor(math.sqrt(area / shares[2]) + 0.5)
    return min(t, time_steps), min(max(1, h), height), min(max(1, w), width)


def sample_context(
    policy: MaskPolicy,
    set_index: int,
    grid: tuple[int, int, int],
    seed: int,
    step: int,
    samples: NDArray[np.int64],
    motion_maps: NDArray[np.float64] | None,
) -> NDArray[np.bool_]:
    """[B, T, H, W], True where the context of mask set `set_index` sees a token. Blocks are redrawn
    until the context is not empty."""
    mask_set = policy.sets[set_index]
    size_stream, origin_stream = (
        stream_id(Stream.BLOCK_SIZE, set_index),
        stream_id(Stream.BLOCK_ORIGIN, set_index),
    )
    context = np.zeros((len(samples), *grid), dtype=np.bool_)
    for b, sample in enumerate(samples):
        size_key = np.int64(SHARED_SAMPLE) if policy.shared_block_size else sample
        block = block_size(mask_set, grid, uniforms(seed, step, size_key, size_stream, 3))
        origins = (grid[0] - block[0] + 1, grid[1] - block[1] + 1, grid[2] - block[2] + 1)
        cumulative = None
        if motion_maps is not None and policy.motion is not None:
            cumulative = np.cumsum(
                origin_weights(block_scores(motion_maps[b], block), policy.motion.strength).ravel()
            )
        for attempt in range(policy.max_attempts):
            visible = np.zeros(grid, dtype=np.bool_)
            visible[: policy.context_steps(grid[0])] = True
            first = attempt * mask_set.num_blocks * DRAWS_PER_BLOCK
            draws = uniforms(
                seed, step, sample, origin_stream, mask_set.num_blocks * DRAWS_PER_BLOCK, first
            )
            for draw in draws.reshape(mask_set.num_blocks, DRAWS_PER_BLOCK):
                if cumulative is None or policy.motion is None:
                    start, top, left = (int(draw[i] * origins[i]) for i in range(3))
                else:
                    start, top, left = _motion_origin(
                        draw, cumulative, origins, policy.motion.random_rate
                    )
                visible[start : start + block[0], top : top + block[1], left : left + block[2]] = (
                    False
                )
            if visible.any():
                context[b] = visible
                break
        else:
            raise ValueError(covers_everything(mask_set, block, grid, policy.max_attempts))
    return context


def _motion_origin(
    draw: NDArray[np.float64],
    cumulative: NDArray[np.float64],
    origins: tuple[int, int, int],
    random_rate: float,
) -> tuple[int, int, int]:
    count = cumulative.size
    if draw[0] < random_rate:
        index = int(draw[1] * count)
    else:
        index = min(
            int(np.searchsorted(cumulative, draw[1] * cumulative[-1], side="right")), count - 1
        )
    return index // (origins[1] * origins[2]), index // origins[2] % origins[1], index % origins[2]


def covers_everything(
    mask_set: MaskSet, block: tuple[int, int, int], grid: tuple[int, int, int], attempts: int
) -> str:
    """The error message for a mask set that never left a context token."""
    return (
        f"sample_masks: mask_set must leave context tokens, got {mask_set.num_blocks} blocks of "
        f"{block} on the grid {grid}, "
        f"which hid every token in {attempts} attempts."
    )
