"""Sampling of mask batches and motion maps: C++ host code where built, NumPy otherwise, the same
numbers either way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepa import host
from jepa.batch import MaskBatch
from jepa.counter_rng import Stream, check_keys, stream_id
from jepa.masks import blocks, motion
from jepa.masks.policy import MaskPolicy, MotionGuidance


def motion_maps(
    clips: Sequence[NDArray[Any]],
    grid: tuple[int, int, int],
    guidance: MotionGuidance | None = None,
    *,
    boxes: Sequence[motion.Box] | None = None,
    flips: Sequence[bool] | None = None,
    backend: str = "auto",
) -> NDArray[np.float64]:
    """[B, T, H, W] motion on the token grid, at most 1.

    Args:
        clips: B arrays, uint8 [F, Hf, Wf, 3] or float [3, F, Hf, Wf]; sizes may differ between
            samples.
        grid: (T, H, W) in tokens.
        guidance: how to read the clip and what to divide by; None means the defaults (area average,
            maximum of the sample).
        boxes: crop of each clip as (top, left, height, width) in pixels; the map covers the crop.
        flips: mirror the map of each clip.
        backend: "auto", "host" or "numpy".
    """
    guidance = guidance if guidance is not None else MotionGuidance()
    module = host.resolve(backend)
    maps = np.empty((len(clips), *grid), dtype=np.float64)
    for b, clip in enumerate(clips):
        motion.check_clip(clip)
        box = boxes[b] if boxes is not None else motion.full_box(clip)
        motion.check_box(box, clip)
        flip = bool(flips[b]) if flips is not None else False
        if guidance.sampling == "point":
            maps[b] = motion.point_motion(clip, grid, box, flip)
        elif module is None:
            maps[b] = motion.area_motion(clip, grid, box, flip)
        else:
            maps[b] = module.area_motion(clip, grid, box, flip)
    return motion.scale_to_maximum(maps, guidance.maximum)


def sample_contexts(
    policy: MaskPolicy,
    grid: tuple[int, int, int],
    *,
    seed: int,
    step: int,
    samples: ArrayLike,
    motion_maps: NDArray[np.float64] | None = None,
    backend: str = "auto",
) -> NDArray[np.bool_]:
    """[J, B, T, H, W], True where a context sees a token, before truncation. See `sample_masks` for
    the arguments."""
    slots = np.asarray(samples, dtype=np.int64)
    if slots.ndim != 1 or slots.size == 0:
        raise ValueError(
            "sample_masks: samples must be a non-empty list of integers, got shape "
            f"{list(slots.shape)}."
        )
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(
            f"sample_masks: grid must be three positive numbers (T, H, W), got {tuple(grid)}."
        )
    check_keys(seed, step, slots)
    if policy.motion is not None and (
        motion_maps is None or motion_maps.shape != (slots.size, *grid)
    ):
        got = "none" if motion_maps is None else str(list(motion_maps.shape))
        raise ValueError(
            f"sample_masks: motion_maps must have shape {[slots.size, *grid]} for a motion-guided "
            f"policy, got {got}."
        )
    maps = (
        None
        if policy.motion is None or motion_maps is None
        else np.ascontiguousarray(motion_maps, dtype=np.float64)
    )
    if maps is not None and not np.isfinite(maps).all():
        raise ValueError("sample_masks: motion_maps must be finite, got NaN or infinity.")
    module = host.resolve(backend)
    contexts = []
    for j, mask_set in enumerate(policy.sets):
        if module is None:
            contexts.append(blocks.sample_context(policy, j, grid, seed, step, slots, maps))
            continue
        context, failed = module.sample_context(
            grid=grid,
            num_blocks=mask_set.num_blocks,
            scales=(*mask_set.temporal_scale, *mask_set.spatial_scale, *mask_set.aspect_ratio),
            context_steps=policy.context_steps(grid[0]),
            max_attempts=policy.max_attempts,
            seed=seed,
            step=step,
            samples=slots,
            size_stream=stream_id(Stream.BLOCK_SIZE, j),
            origin_stream=stream_id(Stream.BLOCK_ORIGIN, j),
            shared_block_size=policy.shared_block_size,
            motion_maps=maps,
            strength=policy.motion.strength if policy.motion is not None else 0.0,
            random_rate=policy.motion.random_rate if policy.motion is not None else 0.0,
        )
        if failed is not None:
            raise ValueError(blocks.covers_everything(mask_set, failed, grid, policy.max_attempts))
        contexts.append(context)
    return np.stack(contexts)


def sample_masks(
    policy: MaskPolicy,
    grid: tuple[int, int, int],
    *,
    seed: int,
    step: int,
    samples: ArrayLike,
    motion_maps: NDArray[np.float64] | None = None,
    horizon: int = 1,
    backend: str = "auto",
) -> MaskBatch:
    """Draws the masks of a batch. The result depends on the arguments only: not on workers, ranks,
    history or backend.

    Args:
        policy: what to hide; see `mask_policy` for the named ones.
        grid: (T, H, W) in tokens; any shape, T = 1 for images.
        seed, step, samples: keys of the random numbers. `samples` [B] are places in the global
            batch, so that two processes with half a batch each draw the masks of one process with
            the whole batch.
        motion_maps: [B, T, H, W] from `motion_maps`, needed by motion-guided policies.
        horizon: K of the temporal pairs.
        backend: "auto", "host" or "numpy".

    Raises:
        ValueError: bad keys or shapes, or blocks that never leave a context token.
    """
    contexts = sample_contexts(
        policy,
        grid,
        seed=seed,
        step=step,
        samples=samples,
        motion_maps=motion_maps,
        backend=backend,
    )
    flat = contexts.reshape(*contexts.shape[:2], -1)
    context_ids = [[np.flatnonzero(one) for one in each_set] for each_set in flat]
    target_ids = [[np.flatnonzero(~one) for one in each_set] for each_set in flat]
    if policy.truncate == "batch_min":
        context_ids = [_truncated(each_set) for each_set in context_ids]
        target_ids = [_truncated(each_set) for each_set in target_ids]
    return MaskBatch.from_ids(context_ids, target_ids, grid, horizon)


def _truncated(ids: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    shortest = min(len(one) for one in ids)
    return [one[:shortest] for one in ids]
