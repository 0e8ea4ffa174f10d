"""MaskBatch: the packed lists against their definitions, written out token by token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from jepa import host
from jepa.batch import Batch, LoadedBatch, MaskBatch
from jepa.masks import mask_policy, sample_masks

BACKENDS = ["numpy"] + (["host"] if not host.reason() else [])


def random_ids(grid, num_sets=2, batch=3, seed=0, share=0.6):
    rng = np.random.default_rng(seed)
    tokens = int(np.prod(grid))
    context, target = [], []
    for _ in range(num_sets):
        kinds = [rng.random(tokens) for _ in range(batch)]
        context.append([rng.permutation(np.flatnonzero(kind < share)) for kind in kinds])
        target.append([np.flatnonzero(kind > max(share, 0.8)) for kind in kinds])
    return context, target


def sequences(ids):
    return [one for each_set in ids for one in each_set]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("grid", "horizon"),
    [((4, 3, 5), 1), ((5, 4, 3), 2), ((1, 4, 4), 1), ((3, 1, 7), 2), ((2, 2, 2), 3)],
)
def test_lists_follow_their_definitions(grid, horizon, backend):
    context, target = random_ids(grid)
    masks = MaskBatch.from_ids(context, target, grid, horizon, backend=backend)
    tokens, sites, batch = int(np.prod(grid)), grid[1] * grid[2], 3
    place = [np.array([n // sites, n // grid[2] % grid[1], n % grid[2]]) for n in range(tokens)]
    distance, pairs, pair_rows, pair_set, columns, column_rows, column_set = (
        [],
        [],
        [],
        [],
        [],
        [],
        [],
    )
    row = 0
    for s, (seen, hidden) in enumerate(zip(sequences(context), sequences(target), strict=True)):
        rows = {int(n): row + i for i, n in enumerate(seen)}
        row += len(seen)
        distance += [
            min(np.sqrt(((place[n] - place[m]) ** 2).sum()) for m in hidden) ** 0.5 for n in seen
        ]
        for first in range(tokens):
            chain = [first + k * sites for k in range(horizon + 1)]
            if chain[-1] < tokens and all(n in rows for n in chain):
                pairs.append([rows[n] for n in chain])
                pair_rows.append([s % batch * tokens + n for n in chain])
                pair_set.append(s // batch)
        for site in range(sites):
            chain = [site + t * sites for t in range(grid[0])]
            if all(n in rows for n in chain):
                columns.append([rows[n] for n in chain])
                column_rows.append([s % batch * tokens + n for n in chain])
                column_set.append(s // batch)

    np.testing.assert_allclose(masks.context_distance.numpy(), distance, rtol=1e-6)
    for got, want, width in [
        (masks.pairs, pairs, horizon + 1),
        (masks.pair_rows, pair_rows, horizon + 1),
        (masks.columns, columns, grid[0]),
        (masks.column_rows, column_rows, grid[0]),
    ]:
        assert got.dtype == torch.int64
        np.testing.assert_array_equal(
            got.numpy(), np.array(want, dtype=np.int64).reshape(-1, width)
        )
    assert masks.pair_set.tolist() == pair_set
    assert masks.column_set.tolist() == column_set
    assert masks.horizon == horizon
    lengths = [len(one) for one in sequences(context)]
    assert masks.context_cu.tolist() == np.concatenate([[0], np.cumsum(lengths)]).tolist()
    assert masks.context_cu.dtype == torch.int32
    assert masks.context_ids.tolist() == np.concatenate(sequences(context)).tolist()
    assert masks.context_rows.tolist() == [
        s % batch * tokens + int(n) for s, one in enumerate(sequences(context)) for n in one
    ]
    assert masks.target_rows.tolist() == [
        s % batch * tokens + int(n) for s, one in enumerate(sequences(target)) for n in one
    ]
    assert masks.target_set.tolist() == [
        s // batch for s, one in enumerate(sequences(target)) for _ in one
    ]
    assert masks.context_count.tolist() == [sum(lengths[:3]), sum(lengths[3:])]
    assert masks.pair_count.tolist() == [pair_set.count(0), pair_set.count(1)]
    assert masks.column_count.tolist() == [column_set.count(0), column_set.count(1)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_distances(shared_dir, backend):
    golden = np.load(shared_dir / "golden" / "modules" / "mask_distance.npz")
    for key, grid in (("g4", (4, 4, 4)), ("g14", (8, 14, 14))):
        for j in (0, 1):
            context, target = (
                list(golden[f"{key}_mask_enc_{j}"]),
                list(golden[f"{key}_mask_pred_{j}"]),
            )
            masks = MaskBatch.from_ids([context], [target], grid, backend=backend)
            np.testing.assert_allclose(
                masks.context_distance.numpy(), golden[f"{key}_dist_{j}"].ravel(), rtol=1e-6
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences(backend):
    none, some = np.zeros(0, dtype=np.int64), np.arange(4)
    masks = MaskBatch.from_ids([[some, none]], [[none, some]], (2, 2, 2), backend=backend)
    assert torch.isinf(masks.context_distance).all()
    assert masks.context_cu.tolist() == [0, 4, 4]
    assert masks.target_cu.tolist() == [0, 0, 4]
    assert masks.pair_count.tolist() == [0.0]
    assert masks.pairs.shape == (0, 2)
    assert masks.columns.shape == (0, 2)


@pytest.mark.parametrize(
    ("context", "target", "grid", "sentence"),
    [
        (
            [[np.array([0, 8])]],
            [[np.array([1])]],
            (2, 2, 2),
            r"context ids must lie in \[0, 8\), got 0 to 8",
        ),
        ([[np.array([0, 0])]], [[np.array([1])]], (2, 2, 2), "context ids must be distinct"),
        (
            [[np.array([0, 1])]],
            [[np.array([1])]],
            (2, 2, 2),
            r"target must not share tokens .* got token 1 in both \(set 0, sample 0\)",
        ),
        (
            [[np.array([0])]],
            [[np.array([1]), np.array([2])]],
            (2, 2, 2),
            "target must hold 1 mask sets of 1 samples",
        ),
        (
            [[np.array([0.5])]],
            [[np.array([1])]],
            (2, 2, 2),
            "context must hold one-dimensional integer arrays",
        ),
        ([[np.array([0])]], [[np.array([1])]], (2, 2, 0), "grid must be three numbers"),
    ],
)
def test_wrong_ids_are_named(context, target, grid, sentence):
    with pytest.raises(ValueError, match=sentence):
        MaskBatch.from_ids(context, target, grid)


def test_a_batch_moves_whole():
    masks = sample_masks(mask_policy("blocks"), (2, 4, 4), seed=0, step=0, samples=[0, 1])
    batch = Batch(torch.zeros(2, 3, 4, 8, 8), masks, 7)
    moved = batch.to("meta")
    assert moved.step == 7
    assert moved.clips.device.type == "meta"
    assert moved.masks.pairs.device.type == "meta"
    assert moved.masks.grid == (2, 4, 4)
    assert batch.clips.device.type == "cpu"


def test_what_a_loader_reads_is_not_yet_what_a_step_takes():
    masks = sample_masks(mask_policy("blocks"), (2, 4, 4), seed=0, step=0, samples=[0, 1])
    clips = torch.zeros(2, 4, 8, 8, 3, dtype=torch.uint8)
    loaded = LoadedBatch(clips, torch.zeros(2).long(), torch.arange(2), masks, None)
    normalised = torch.zeros(2, 3, 4, 8, 8)
    assert loaded.for_step(normalised, 7).masks is masks
    with pytest.raises(ValueError, match=r"clips must be float \[B, 3, .*, got torch.uint8 \[2, 4"):
        loaded.for_step(clips, 7)
    with pytest.raises(ValueError, match="masks must be given for a training step, got None"):
        dataclasses.replace(loaded, masks=None).for_step(normalised, 7)
