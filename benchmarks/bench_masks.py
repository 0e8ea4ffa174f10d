"""Masks, motion maps and index lists of one batch: host code against slicing, against its NumPy
reference, and against all-pairs distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import harness
from benchmarks.resolutions import parse_resolution
from jepa.batch import MaskBatch
from jepa.masks import MaskPolicy, block_scores, mask_policy, motion_maps, sample_contexts
from jepa.masks.blocks import block_size
from jepa.masks.motion import SCORE_FLOOR

BATCH = 8
FRAMES = 16


def slicing_sampler(policy: MaskPolicy, maps: NDArray[np.float64], seed: int) -> NDArray[np.bool_]:
    """Motion-guided masks as one writes them first: the mean of a slice at every origin, then a
    weighted draw per block."""
    assert policy.motion is not None
    rng = np.random.default_rng(seed)
    grid = maps.shape[1:]
    context = np.ones((len(policy.sets), *maps.shape), dtype=np.bool_)
    for mask_set, seen in zip(policy.sets, context, strict=True):
        for motion, visible in zip(maps, seen, strict=True):
            block = block_size(mask_set, grid, rng.random(3))
            origins = [
                (t, y, x)
                for t in range(grid[0] - block[0] + 1)
                for y in range(grid[1] - block[1] + 1)
                for x in range(grid[2] - block[2] + 1)
            ]
            scores = np.array(
                [
                    motion[t : t + block[0], y : y + block[1], x : x + block[2]].mean()
                    for t, y, x in origins
                ]
            )
            weights = np.maximum(scores, SCORE_FLOOR) ** policy.motion.strength
            chances = (
                1 - policy.motion.random_rate
            ) * weights / weights.sum() + policy.motion.random_rate / weights.size
            for pick in np.searchsorted(chances.cumsum(), rng.random(mask_set.num_blocks)):
                t, y, x = origins[min(int(pick), len(origins) - 1)]
                visible[t : t + block[0], y : y + block[1], x : x + block[2]] = False
    return context


def all_pairs_distance(
    context: list[NDArray[np.int64]], target: list[NDArray[np.int64]], grid: tuple[int, int, int]
) -> torch.Tensor:
    """Distance to the nearest target by a matrix of all pairs, one sequence at a time."""

    def places(ids: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.stack(np.unravel_index(ids, grid), axis=1)).float()

    nearest = [
        torch.cdist(places(seen), places(hidden)).min(dim=1).values.sqrt()
        for seen, hidden in zip(context, target, strict=True)
    ]
    return torch.cat(nearest)


def slicing_scores(motion: NDArray[np.float64], block: tuple[int, int, int]) -> NDArray[np.float64]:
    t, h, w = block
    shape = tuple(n - k + 1 for n, k in zip(motion.shape, block, strict=True))
    return np.array(
        [motion[z : z + t, y : y + h, x : x + w].mean() for z, y, x in np.ndindex(*shape)]
    ).reshape(shape)


def same(
    name: str, ours: Callable[[], NDArray], theirs: Callable[[], NDArray], rtol: float
) -> Callable[[], None]:
    return lambda: harness.require_close(
        name,
        torch.from_numpy(ours().astype(np.float64)),
        torch.from_numpy(theirs().astype(np.float64)),
        rtol=rtol,
    )


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    rng = np.random.default_rng(options.seed)
    policy = mask_policy("motion")
    for name in ("112",) if options.quick else ("112", "224", "384", "240p"):
        size = parse_resolution(name)
        grid = size.grid(FRAMES)
        label = f"{name}/{FRAMES}f"
        details: dict[str, object] = {"resolution": name, "grid": list(grid), "batch": BATCH}
        clips = [
            rng.integers(0, 256, (FRAMES, size.height, size.width, 3), dtype=np.uint8)
            for _ in range(BATCH)
        ]
        maps = motion_maps(clips, grid)
        keys: dict[str, object] = {
            "seed": options.seed,
            "step": 1,
            "samples": range(BATCH),
            "motion_maps": maps,
        }
        block = (grid[0], max(1, grid[1] // 3), max(1, grid[2] // 3))

        def host_contexts(keys=keys, grid=grid) -> NDArray[np.bool_]:
            return sample_contexts(policy, grid, backend="host", **keys)

        def numpy_contexts(keys=keys, grid=grid) -> NDArray[np.bool_]:
            return sample_contexts(policy, grid, backend="numpy", **keys)

        scores_gate = same(
            "scores",
            lambda m=maps, b=block: block_scores(m[0], b),
            lambda m=maps, b=block: slicing_scores(m[0], b),
            1e-12,
        )
        yield harness.Comparison(
            f"motion_guided/{label}",
            "float64",
            "sample",
            "host",
            "slicing",
            host_contexts,
            lambda maps=maps: slicing_sampler(policy, maps, options.seed),
            scores_gate,
            details=details,
        )
        yield harness.Comparison(
            f"motion_guided/{label}",
            "float64",
            "sample",
            "host",
            "numpy",
            host_contexts,
            numpy_contexts,
            same("masks", host_contexts, numpy_contexts, 0.0),
            details=details,
        )

        def host_maps(clips=clips, grid=grid) -> NDArray[np.float64]:
            return motion_maps(clips, grid, backend="host")

        def numpy_maps(clips=clips, grid=grid) -> NDArray[np.float64]:
            return motion_maps(clips, grid, backend="numpy")

        yield harness.Comparison(
            f"motion_map/{label}",
            "uint8",
            "map",
            "host",
            "numpy",
            host_maps,
            numpy_maps,
            same("maps", host_maps, numpy_maps, 0.0),
            bytes=float(sum(clip.nbytes for clip in clips)),
            details=details,
        )

        flat = host_contexts().reshape(2, BATCH, -1)
        context = [[np.flatnonzero(one) for one in each] for each in flat]
        target = [[np.flatnonzero(~one) for one in each] for each in flat]

        def lists(backend: str, context=context, target=target, grid=grid) -> MaskBatch:
            return MaskBatch.from_ids(context, target, grid, backend=backend)

        def distances(context=context, target=target, grid=grid) -> torch.Tensor:
            return all_pairs_distance(
                [s for each in context for s in each], [s for each in target for s in each], grid
            )

        def lists_gate(lists=lists, distances=distances) -> None:
            harness.require_close(
                "distance", lists("host").context_distance, distances(), rtol=1e-6
            )
            harness.require_close("pairs", lists("host").pairs, lists("numpy").pairs, rtol=0.0)

        yield harness.Comparison(
            f"lists/{label}",
            "int64",
            "lists",
            "host",
            "numpy",
            lambda lists=lists: lists("host"),
            lambda lists=lists: lists("numpy"),
            lists_gate,
            details=details,
        )
        yield harness.Comparison(
            f"lists/{label}",
            "int64",
            "lists",
            "host",
            "cdist (distances only)",
            lambda lists=lists: lists("host"),
            distances,
            lists_gate,
            details=details,
        )


if __name__ == "__main__":
    raise SystemExit(harness.main("masks", comparisons, __doc__))
