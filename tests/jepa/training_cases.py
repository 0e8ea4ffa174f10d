"""Small models, ragged masks and batches that several tests of the training stack share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from jepa.batch import Batch, MaskBatch
from jepa.data.transforms import ViewSpec, cut_views
from jepa.models.sizes import ModelConfig, PredictorConfig
from jepa.objectives import (
    Denominators,
    Factorisation,
    FeatureDims,
    ObjectiveConfig,
    ObjectiveContext,
    build_heads,
)
from jepa.published_behaviour import PublishedBehaviour
from jepa.schedules import ScheduleConfig
from jepa.step import StepConfig
from jepa.variants import variant

GRID = (4, 3, 5)
LEVELS = 2
WIDTH = 12  # D: both levels


def small_model(**changes) -> ModelConfig:
    values = dict(
        width=24,
        depth=2,
        heads=3,
        level_blocks=(0, 1),
        predictor=PredictorConfig(width=16, depth=2, heads=2),
    )
    return ModelConfig(**{**values, **changes})


def ragged_masks(
    grid=GRID,
    batch_size: int = 3,
    num_sets: int = 2,
    seed: int = 0,
    horizon: int = 1,
    share: float = 0.6,
) -> MaskBatch:
    """Every sequence has its own number of context and target tokens, in no order; some tokens are
    neither."""
    rng = np.random.default_rng(seed)
    tokens = int(np.prod(grid))
    context, target = [], []
    for j in range(num_sets):
        drawn = [rng.permutation(tokens) for _ in range(batch_size)]
        cuts = [sorted(rng.integers(1, tokens, 2)) for _ in range(batch_size)]
        sizes = [max(2, int(share * tokens) + int(rng.integers(-3, 4)) - j) for _ in cuts]
        context.append([ids[:size] for ids, size in zip(drawn, sizes, strict=True)])
        target.append(
            [
                ids[size : tokens - b % 3]
                for b, (ids, size) in enumerate(zip(drawn, sizes, strict=True))
            ]
        )
    return MaskBatch.from_ids(context, target, grid, horizon)


def random_bytes(
    grid=(4, 4, 4), batch_size: int = 2, *, patch: int = 16, tubelet: int = 2, seed: int = 0
) -> torch.Tensor:
    """Clips as a loader reads them, uint8 [B, frames, H, W, 3], of a token grid."""
    frames = 1 if grid[0] == 1 else grid[0] * tubelet
    size = (grid[1] * patch, grid[2] * patch)
    return torch.randint(
        0,
        256,
        (batch_size, frames, *size, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )


def make_batch(
    grid=(4, 4, 4), batch_size: int = 2, *, seed: int = 0, step: int = 0, horizon: int = 1
) -> Batch:
    clips = random_bytes(grid, batch_size, seed=seed)
    return Batch(
        cut_views(clips, None, ViewSpec(*clips.shape[2:4])),
        ragged_masks(grid, batch_size, seed=seed, horizon=horizon),
        step,
    )


def joined(parts: list[Batch]) -> Batch:
    """One batch of the samples of several."""

    def lists(ids: torch.Tensor, cu: torch.Tensor) -> list[np.ndarray]:
        return [p.numpy() for p in torch.tensor_split(ids, cu[1:-1].long())]

    sets = parts[0].masks.num_sets
    context, target = [[] for _ in range(sets)], [[] for _ in range(sets)]
    for part in parts:
        masks = part.masks
        for kind, ids, cu in (
            (context, masks.context_ids, masks.context_cu),
            (target, masks.target_ids, masks.target_cu),
        ):
            split = lists(ids, cu)
            for j in range(sets):
                kind[j] += split[j * masks.batch_size : (j + 1) * masks.batch_size]
    clips = torch.cat([part.clips for part in parts])
    masks = MaskBatch.from_ids(context, target, parts[0].masks.grid, parts[0].masks.horizon)
    return Batch(clips, masks, parts[0].step)


def step_config(
    name: str = "baseline", total_steps: int = 100, model: ModelConfig | None = None, **changes
) -> StepConfig:
    """A variant on the small model, with the context loss on from the first step."""
    own = {"objectives": {"context": {"schedule": {"kind": "constant"}}}}
    for key, value in changes.pop("variant", {}).items():
        own[key] = {**own.get(key, {}), **value} if isinstance(value, Mapping) else value
    schedule = ScheduleConfig(total_steps=total_steps, warmup_steps=1)
    return StepConfig(
        model=model or small_model(), variant=variant(name, **own), schedule=schedule, **changes
    )


def random_context(
    objectives: Mapping[str, ObjectiveConfig],
    masks: MaskBatch | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    published_behaviour: PublishedBehaviour | None = None,
    factorisation: Factorisation | None = None,
    online: bool = False,
    patch: int = 2,
) -> ObjectiveContext:
    """Random features for `masks`, all of them leaves that need a gradient."""
    masks = ragged_masks() if masks is None else masks
    generator = torch.Generator().manual_seed(seed)
    steps, height, width = masks.grid
    rows = masks.batch_size * masks.num_tokens

    def features(count: int, needs_grad: bool = True) -> torch.Tensor:
        return torch.randn(count, WIDTH, generator=generator, dtype=dtype).requires_grad_(
            needs_grad
        )

    target = features(rows, online)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = build_heads(
            objectives, FeatureDims(WIDTH, LEVELS, factorisation or Factorisation())
        ).to(dtype)
    return ObjectiveContext(
        context_tokens=features(masks.context_ids.shape[0]),
        predicted_tokens=features(masks.target_ids.shape[0]),
        predicted_context=features(masks.context_ids.shape[0]),
        target=target,
        target_live=target,
        masks=masks,
        denominators=Denominators.of(masks),
        levels=LEVELS,
        factorisation=factorisation or Factorisation(),
        heads=heads,
        published_behaviour=published_behaviour or PublishedBehaviour(),
        clips=torch.randn(
            masks.batch_size,
            3,
            steps,
            height * patch,
            width * patch,
            generator=generator,
            dtype=dtype,
        ),
        patch_size=patch,
        tubelet_size=1,
    )
