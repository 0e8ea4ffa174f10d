"""Where a clip moves: motion maps on the token grid, block scores, and the distribution of block
origins. The NumPy reference of csrc/host."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Box = tuple[float, float, float, float]

# The published floor of a block score: origins without motion keep a chance, and a still clip gives
# the uniform distribution.
SCORE_FLOOR = 1e-6


def check_clip(clip: NDArray[Any]) -> None:
    """uint8 clips are channel-last as decoded, float clips channel-first as the models read
    them."""
    is_bytes = clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[3] == 3
    is_float = clip.dtype in (np.float32, np.float64) and clip.ndim == 4 and clip.shape[0] == 3
    if not (is_bytes or is_float) or clip.size == 0:
        raise ValueError(
            f"motion_map: clip must be uint8 [T, H, W, 3] or float [3, T, H, W], got {clip.dtype} "
            f"{list(clip.shape)}."
        )


def full_box(clip: NDArray[Any]) -> Box:
    """(top, left, height, width) in pixels of the whole frame."""
    height, width = clip.shape[1:3] if clip.dtype == np.uint8 else clip.shape[2:4]
    return 0.0, 0.0, float(height), float(width)


def check_box(box: Box, clip: NDArray[Any]) -> None:
    """A box lies inside the frame and has an area."""
    top, left, height, width = box
    frame_height, frame_width = full_box(clip)[2:]
    # Fractions of a pixel that float arithmetic adds at the far edge are cut off by the cells.
    inside = (
        top >= 0
        and left >= 0
        and top + height <= frame_height + 1e-6
        and left + width <= frame_width + 1e-6
    )
    if not (inside and height > 0 and width > 0):
        raise ValueError(
            "motion_map: box must be (top, left, height, width) inside the frame "
            f"{frame_height:g} x {frame_width:g}, got {tuple(box)}."
        )


def frame_changes(clip: NDArray[Any]) -> Float64:
    """[F, H, W] sum over channels of |x_t - x_{t-1}|; the first frame takes the change of the
    second; zero for a single frame."""
    frames = clip if clip.dtype == np.uint8 else np.moveaxis(clip, 0, -1)
    change = np.zeros(frames.shape[:3], dtype=np.float64)
    if len(frames) > 1:
        step = np.abs(frames[1:].astype(np.float64) - frames[:-1].astype(np.float64))
        change[1:] = (step[..., 0] + step[..., 1]) + step[..., 2]
        change[0] = change[1]
    return change


def _cell_integrals(values: Float64, axis: int, start: float, extent: float, cells: int) -> Float64:
    """Integrals of a piecewise constant signal over `cells` equal cells of [start, start+extent]:
    fractional pixels count by their share.

    The running sum starts at the first pixel touched and is sequential along the axis:
    csrc/host/motion.cpp adds in the same order, so both give the same bits.
    """
    moved = np.moveaxis(values, axis, 0)
    first, last = math.floor(start), min(math.ceil(start + extent), moved.shape[0])
    moved = moved[first:last]
    running = np.concatenate([np.zeros_like(moved[:1]), np.cumsum(moved, axis=0)])
    edges = (start - first) + np.arange(cells + 1, dtype=np.float64) * extent / cells
    edges = np.minimum(edges, float(last - first))
    whole = np.minimum(np.floor(edges).astype(np.int64), last - first - 1)
    share = (edges - whole).reshape(-1, *[1] * (moved.ndim - 1))
    at_edge = running[whole] + share * moved[whole]
    return np.moveaxis(at_edge[1:] - at_edge[:-1], 0, axis)


def area_motion(
    clip: NDArray[Any], grid: tuple[int, int, int], box: Box | None = None, flip: bool = False
) -> Float64:
    """[T, H, W] mean absolute frame difference per cell of the grid, averaged over the exact area
    of each cell inside `box`.

    Args:
        clip: uint8 [F, Hf, Wf, 3] or float [3, F, Hf, Wf].
        grid: (T, H, W) in tokens.
        box: (top, left, height, width) in pixels, fractions allowed; None means the frame.
        flip: mirror the columns, for a clip that is going to be flipped.
    """
    check_clip(clip)
    box = box if box is not None else full_box(clip)
    check_box(box, clip)
    top, left, height, width = box
    change = frame_changes(clip)
    frames = change.shape[0]
    across = _cell_integrals(change, 2, left, width, grid[2])
    down = _cell_integrals(across, 1, top, height, grid[1])
    cells = _cell_integrals(down, 0, 0.0, float(frames), grid[0])
    volume = (frames / grid[0]) * (height / grid[1]) * (width / grid[2]) * 3.0
    mean = cells / volume
    return np.ascontiguousarray(mean[:, :, ::-1]) if flip else mean


def point_motion(
    clip: NDArray[Any], grid: tuple[int, int, int], box: Box | None = None, flip: bool = False
) -> Float64:
    """[T, H, W] frame differences read at cell centres by trilinear interpolation: the published
    map, blind between centres."""
    check_clip(clip)
    box = box if box is not None else full_box(clip)
    check_box(box, clip)
    top, left, height, width = box
    values = frame_changes(clip) / 3.0
    spans = ((0.0, float(values.shape[0])), (top, height), (left, width))
    for axis, ((start, extent), cells) in enumerate(zip(spans, grid, strict=True)):
        size = values.shape[axis]
        centre = np.clip(start + (np.arange(cells) + 0.5) * extent / cells - 0.5, 0.0, size - 1.0)
        low = np.floor(centre).astype(np.int64)
        high = np.minimum(low + 1, size - 1)
        share = (centre - low).reshape([-1 if a == axis else 1 for a in range(3)])
        values = np.take(values, low, axis) * (1.0 - share) + np.take(values, high, axis) * share
    return np.ascontiguousarray(values[:, :, ::-1]) if flip else values


def scale_to_maximum(maps: Float64, maximum: Literal["sample", "published"]) -> Float64:
    """[B, T, H, W] divided by the maximum of each sample; a map without motion stays zero.

    "published" divides sample b, step t by the maximum of sample t (a broadcasting slip), which
    needs B = T or B = 1.
    """
    peak = maps.reshape(len(maps), -1).max(axis=1)
    if maximum == "sample":
        divisor = peak[:, None, None, None]
    elif len(maps) in (1, maps.shape[1]):
        divisor = peak[None, :, None, None]
    else:
        raise ValueError(
            "scale_to_maximum: batch size must be 1 or the number of time steps "
            f"({maps.shape[1]}) for the published maximum, "
            f"got {len(maps)}."
        )
    scaled: Float64 = np.divide(maps, divisor, out=np.zeros_like(maps), where=divisor > 0)
    return scaled


def block_scores(motion_map: Float64, block: tuple[int, int, int]) -> Float64:
    """Mean of a [T, H, W] map in the block at every origin: [T-t+1, H-h+1, W-w+1], from a
    summed-volume table in O(grid)."""
    t, h, w = block
    table = np.zeros(tuple(n + 1 for n in motion_map.shape), dtype=np.float64)
    table[1:, 1:, 1:] = motion_map.cumsum(axis=2).cumsum(axis=1).cumsum(axis=0)
    late, early = table[t:], table[:-t]
    total = late[:, h:, w:] - early[:, h:, w:]
    total = total - late[:, :-h, w:]
    total = total + early[:, :-h, w:]
    total = total - late[:, h:, :-w]
    total = total + early[:, h:, :-w]
    total = total + late[:, :-h, :-w]
    total = total - early[:, :-h, :-w]
    return total / float(t * h * w)


def origin_weights(scores: Float64, strength: float) -> Float64:
    """max(score, floor)^strength. Whole strengths multiply left to right, others call libm's pow:
    the same bits as the host code."""
    base = np.maximum(scores, SCORE_FLOOR)
    if strength == int(strength) and strength <= 64:
        power = np.ones_like(base)
        for _ in range(int(strength)):
            power = power * base
        return power
    return np.array(
        [math.pow(value, strength) for value in base.ravel()], dtype=np.float64
    ).reshape(base.shape)


def origin_probabilities(
    motion_map: Float64, block: tuple[int, int, int], strength: float, random_rate: float
) -> Float64:
    """Exact distribution of the block origin, in row-major order of (t, y, x)."""
    weights = origin_weights(block_scores(motion_map, block), strength).ravel()
    shares: Float64 = (1.0 - random_rate) * weights / weights.sum() + random_rate / weights.size
    return shares
