"""Masks: distributions against closed forms, motion against an oracle and the published numbers,
C++ against NumPy bit for bit."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from jepa import host
from jepa.counter_rng import Stream, permutation, philox4x32, stream_id, uniforms
from jepa.masks import (
    MaskPolicy,
    MaskSet,
    MotionGuidance,
    block_scores,
    mask_policy,
    motion_maps,
    origin_probabilities,
    sample_contexts,
    sample_masks,
)
from jepa.masks import motion as motion_math
from jepa_kernels.testing import FLOAT32_STORED, FLOAT64, FLOAT64_SHORT
from tests.conftest import missing

BACKENDS = ["numpy"] + (["host"] if not host.reason() else [])
needs_host = pytest.mark.skipif(
    bool(host.reason()), reason=f"the host module is missing: {host.reason()}"
)
POLICIES = ["blocks", "motion", "future", "motion_future", "tubes"]


def test_the_host_module_is_built():
    if host.reason():
        missing(host.reason())
    info = host.resolve("host").build_info()
    assert info["cpp_standard"] >= 202002


def test_philox_known_answers():
    """Vectors of the Random123 distribution for philox4x32-10."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, want in cases:
        assert tuple(int(word) for word in philox4x32(counter, key)) == want


def test_numbers_do_not_depend_on_how_many_are_asked_for():
    long = uniforms(3, 5, np.arange(4), stream_id(Stream.VIEW), 11)
    np.testing.assert_array_equal(
        long[2, 4:9], uniforms(3, 5, np.int64(2), stream_id(Stream.VIEW), 5, first=4)
    )
    assert long.min() >= 0
    assert long.max() < 1
    assert (
        len(
            {
                uniforms(*key, 1).item()
                for key in [
                    (0, 0, 0, 256),
                    (1, 0, 0, 256),
                    (0, 1, 0, 256),
                    (0, 2**32, 0, 256),
                    (0, 0, 1, 256),
                    (0, 0, 0, 257),
                ]
            }
        )
        == 6
    )
    assert sorted(permutation(1, 0, 1000)) == list(range(1000))
    assert (permutation(1, 0, 1000) != permutation(1, 1, 1000)).any()
    with pytest.raises(ValueError, match="seed must lie"):
        uniforms(-1, 0, np.int64(0), 256, 1)
    with pytest.raises(ValueError, match="sample must be integers"):
        uniforms(0, 0, np.int64(2**32), 256, 1)


@needs_host
def test_host_numbers_are_the_same():
    module = host.resolve("host")
    for seed, step, sample in [
        (0, 0, 0),
        (2**64 - 1, 2**48 - 1, 2**32 - 1),
        (123456789, 987654321, 4242),
    ]:
        np.testing.assert_array_equal(
            module.uniforms(seed, step, sample, 0x1203, 9),
            uniforms(seed, step, np.int64(sample), 0x1203, 9),
        )


def random_clip(rng, frames=6, size=(20, 27), kind=np.uint8):
    if kind == np.uint8:
        return rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8)
    return rng.standard_normal((3, frames, *size)).astype(kind)


@needs_host
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("grid", [(8, 14, 14), (3, 5, 9), (1, 7, 6), (4, 24, 10)])
@pytest.mark.parametrize("shared_size", [False, True])
def test_host_masks_equal_numpy_masks(policy, grid, shared_size):
    rng = np.random.default_rng(0)
    chosen = mask_policy(policy, strength=5.0 if shared_size else 2.5)
    chosen = MaskPolicy(
        sets=chosen.sets,
        motion=chosen.motion,
        context_share=chosen.context_share,
        shared_block_size=shared_size,
    )
    clips = [
        random_clip(rng, frames=2 * grid[0], size=(3 * grid[1], 4 * grid[2])) for _ in range(3)
    ]
    maps = {
        name: motion_maps(clips, grid, chosen.motion, backend=name) for name in ("host", "numpy")
    }
    np.testing.assert_array_equal(maps["host"], maps["numpy"])
    for step in range(6):
        drawn = [
            sample_contexts(
                chosen,
                grid,
                seed=11,
                step=step,
                samples=[5, 0, 4_000_000_000],
                motion_maps=maps["numpy"],
                backend=name,
            )
            for name in ("host", "numpy")
        ]
        np.testing.assert_array_equal(*drawn)
        assert drawn[0].reshape(2, 3, -1).any(axis=-1).all()


@needs_host
@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize(
    ("frames", "grid"), [(6, (3, 5, 7)), (5, (2, 3, 4)), (1, (1, 5, 5)), (2, (4, 30, 40))]
)
@pytest.mark.parametrize("flip", [False, True])
def test_host_motion_equals_numpy_motion(kind, frames, grid, flip):
    clip = random_clip(np.random.default_rng(1), frames, kind=kind)
    for box in (None, (0.3, 2.7, 15.2, 20.9), (4.0, 0.0, 16.0, 27.0), (19.5, 26.5, 0.5, 0.5)):
        boxes = None if box is None else [box]
        got = [
            motion_maps([clip], grid, boxes=boxes, flips=[flip], backend=name)
            for name in ("host", "numpy")
        ]
        np.testing.assert_array_equal(*got)
        raw = host.resolve("host").area_motion(clip, grid, box or motion_math.full_box(clip), flip)
        np.testing.assert_array_equal(raw, motion_math.area_motion(clip, grid, box, flip))
    np.testing.assert_array_equal(
        host.resolve("host").block_scores(got[0][0], (1, 2, 3)), block_scores(got[0][0], (1, 2, 3))
    )


def overlap(start, extent, cells, pixels):
    """[cells, pixels] length of each pixel inside each cell, straight from the definition of an
    area average."""
    edges = start + np.arange(cells + 1) * (extent / cells)
    pixel = np.arange(pixels)
    return np.clip(
        np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel), 0, None
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_motion_maps_equal_a_float64_oracle(backend, kind):
    rng = np.random.default_rng(2)
    grid, box = (3, 4, 5), (1.25, 3.5, 17.5, 21.0)
    clips = [random_clip(rng, 7, kind=kind) for _ in range(2)]
    maps = motion_maps(clips, grid, boxes=[box, box], flips=[False, True], backend=backend)
    for clip, got, flip in zip(clips, maps, (False, True), strict=True):
        frames = (
            clip.astype(np.float64)
            if kind == np.uint8
            else np.moveaxis(clip.astype(np.float64), 0, -1)
        )
        change = np.abs(np.diff(frames, axis=0)).mean(axis=-1)
        change = np.concatenate([change[:1], change])
        weights = [
            overlap(0, 7, 3, 7),
            overlap(box[0], box[2], 4, 20),
            overlap(box[1], box[3], 5, 27),
        ]
        cells = np.einsum("fyx,tf,hy,wx->thw", change, *weights) / ((7 / 3) * (17.5 / 4) * (21 / 5))
        want = cells / cells.max()
        np.testing.assert_allclose(got, want[:, :, ::-1] if flip else want, **FLOAT64_SHORT)


def test_block_scores_and_probabilities_equal_slicing():
    rng = np.random.default_rng(3)
    motion = rng.random((4, 5, 6))
    block = (2, 3, 1)
    want = np.array(
        [
            motion[t : t + 2, y : y + 3, x : x + 1].mean()
            for t, y, x in itertools.product(range(3), range(3), range(6))
        ]
    )
    np.testing.assert_allclose(block_scores(motion, block).ravel(), want, **FLOAT64_SHORT)
    probabilities = 0.7 * want**3 / (want**3).sum() + 0.3 / want.size
    np.testing.assert_allclose(
        origin_probabilities(motion, block, 3.0, 0.3), probabilities, **FLOAT64_SHORT
    )
    np.testing.assert_allclose(
        origin_probabilities(np.zeros((4, 5, 6)), block, 5.0, 0.0), 1 / want.size, **FLOAT64_SHORT
    )


def test_published_motion_distribution(shared_dir):
    golden = np.load(shared_dir / "golden" / "modules" / "motion_masking.npz")
    clips, grid = list(golden["clip"]), (4, 8, 8)
    compared = 0
    for kind, maximum, key in (
        ("batch", "published", "motion_map_batch4"),
        ("single", "sample", "motion_map_single"),
    ):
        maps = motion_maps(clips, grid, MotionGuidance(sampling="point", maximum=maximum))
        np.testing.assert_allclose(maps, golden[key], **FLOAT32_STORED)
        for name in [name for name in golden.files if f"_probs_{kind}_" in name]:
            case, mask = name.split("_size")[0], name.split("_probs")[0]
            block = tuple(int(v) for v in golden[f"{mask}_block"])
            got = origin_probabilities(
                maps[int(name[-1])],
                block,
                float(golden[f"{case}_strength"]),
                float(golden[f"{case}_random_rate"]),
            )
            np.testing.assert_allclose(got, golden[name], **FLOAT32_STORED)
            origins = itertools.product(
                *(range(n - k + 1) for n, k in zip(grid, block, strict=True))
            )
            np.testing.assert_array_equal(golden[f"{mask}_origins"], list(origins))
            compared += 1
    assert compared == 48


def test_area_maps_see_what_point_samples_miss():
    """Motion in the odd pixels of every 8 x 8 cell: the published map is zero, although most of the
    picture moves."""
    clip = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    clip[1] = 255
    centre = np.array([8 * i + k for i in range(4) for k in (3, 4)])
    clip[1][np.ix_(centre, centre)] = 0
    grid = (1, 4, 4)
    assert motion_maps([clip], grid, MotionGuidance(sampling="point")).max() == 0
    assert motion_maps([clip], grid).min() == 1


def origin_of(context):
    """(y, x) of the single hidden block of each [H, W] mask."""
    hidden = ~context
    return hidden.any(axis=-1).argmax(axis=-1), hidden.any(axis=-2).argmax(axis=-1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_origins_are_uniform_over_all_positions(backend):
    """Chi-squared over every position of a 2 x 3 block on a 5 x 7 frame, the last row and column
    included."""
    draws = 4000 if backend == "numpy" else 40000
    policy = MaskPolicy(sets=(MaskSet(1, (6.1 / 35, 6.1 / 35), aspect_ratio=(2 / 3, 2 / 3)),))
    context = sample_contexts(
        policy, (2, 5, 7), seed=1, step=0, samples=np.arange(draws), backend=backend
    )[0]
    assert ((~context).reshape(draws, -1).sum(axis=1) == 2 * 2 * 3).all()
    y, x = origin_of(context[:, 0])
    counts = np.bincount(y * 5 + x, minlength=20)
    assert counts.size == 20
    assert counts.min() > 0
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_motion_origins_follow_the_stated_distribution(backend):
    draws = 4000 if backend == "numpy" else 40000
    rng = np.random.default_rng(4)
    motion = rng.random((3, 5, 6)) ** 3
    mask_set = MaskSet(
        1, (6.1 / 30, 6.1 / 30), temporal_scale=(0.7, 0.7), aspect_ratio=(2 / 3, 2 / 3)
    )
    policy = MaskPolicy(sets=(mask_set,), motion=MotionGuidance(strength=2.0, random_rate=0.2))
    maps = np.broadcast_to(motion, (draws, 3, 5, 6))
    context = sample_contexts(
        policy,
        (3, 5, 6),
        seed=2,
        step=9,
        samples=np.arange(draws),
        motion_maps=maps,
        backend=backend,
    )[0]
    start = (~context).any(axis=(2, 3)).argmax(axis=1)
    y, x = origin_of(context.all(axis=1))
    counts = np.bincount((start * 4 + y) * 4 + x, minlength=32)
    expected = origin_probabilities(motion, (2, 2, 3), 2.0, 0.2) * draws
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def covered(length, block):
    """Probability that a uniformly placed block covers each position of one axis."""
    positions = length - block + 1
    return np.array(
        [(min(i, positions - 1) - max(0, i - block + 1) + 1) / positions for i in range(length)]
    )


def size_distribution(mask_set, height, width):
    """Exact probabilities of (h, w): the aspect ratio is uniform, and the size changes where a root
    crosses a half."""
    area = max(1, int(height * width * mask_set.spatial_scale[0]))
    low, high = mask_set.aspect_ratio
    halves = np.arange(1, max(height, width) + 2) - 0.5
    cuts = sorted(
        {low, high, *(c for c in (*(halves**2 / area), *(area / halves**2)) if low < c < high)}
    )
    sizes = {}
    for start, end in itertools.pairwise(cuts):
        ratio = (start + end) / 2
        size = (
            min(height, max(1, round(math.sqrt(area * ratio)))),
            min(width, max(1, round(math.sqrt(area / ratio)))),
        )
        sizes[size] = sizes.get(size, 0.0) + (end - start) / (high - low)
    return sizes


def context_frequency(mask_set, height, width):
    """[H, W] probability that a token is seen, given that some token is: closed form per size,
    redraws by enumerating two blocks."""
    total = np.zeros((height, width))
    for (h, w), probability in size_distribution(mask_set, height, width).items():
        seen = (1 - np.outer(covered(height, h), covered(width, w))) ** mask_set.num_blocks
        some = 1.0
        if mask_set.num_blocks == 2:
            origins = list(itertools.product(range(height - h + 1), range(width - w + 1)))
            full = 0
            for first, second in itertools.product(origins, origins):
                hidden = np.zeros((height, width), dtype=bool)
                for y, x in (first, second):
                    hidden[y : y + h, x : x + w] = True
                full += hidden.all()
            some = 1 - full / len(origins) ** 2
        total += probability * seen / some
    return total


@pytest.mark.parametrize("mask_set", [MaskSet(8, (0.15, 0.15)), MaskSet(2, (0.7, 0.7))])
@pytest.mark.parametrize("size", [(10, 10), (7, 11)])
def test_token_frequencies_equal_the_closed_form(mask_set, size):
    draws = 3000 if host.reason() else 30000
    context = sample_contexts(
        MaskPolicy(sets=(mask_set,)), (2, *size), seed=3, step=1, samples=np.arange(draws)
    )[0]
    assert (context[:, 0] == context[:, 1]).all()
    frequency = context[:, 0].mean(axis=0)
    want = context_frequency(mask_set, *size)
    # Five standard errors of each of the 100 or so frequencies.
    assert (
        np.abs(frequency - want) <= 5 * np.sqrt(want * (1 - want) / draws) + FLOAT64["rtol"]
    ).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_masks_are_a_function_of_their_keys(policy):
    """Any split of the batch, any order of steps: the same masks. That is what makes workers, ranks
    and resumes not matter."""
    grid, chosen = (4, 6, 6), mask_policy(policy)
    rng = np.random.default_rng(5)
    maps = rng.random((4, *grid))
    both = {
        step: sample_contexts(chosen, grid, seed=7, step=step, samples=range(4), motion_maps=maps)
        for step in (3, 4)
    }
    for step in (4, 3):
        for half in ([0, 1], [2, 3], [3, 1]):
            part = sample_contexts(
                chosen, grid, seed=7, step=step, samples=half, motion_maps=maps[half]
            )
            np.testing.assert_array_equal(part, both[step][:, half])
    assert (both[3] != both[4]).any()
    assert (
        both[3] != sample_contexts(chosen, grid, seed=8, step=3, samples=range(4), motion_maps=maps)
    ).any()
    assert (both[3][:, 0] != both[3][:, 1]).any()


def test_future_policies_keep_the_context_in_the_first_half():
    masks = sample_masks(mask_policy("future"), (8, 6, 6), seed=0, step=0, samples=range(4))
    assert masks.context_ids.max() < 4 * 36
    assert masks.context_count.sum() + masks.target_count.sum() == 2 * 4 * 8 * 36
    image = sample_masks(mask_policy("future"), (1, 6, 6), seed=0, step=0, samples=range(4))
    assert image.context_count.min() > 0
    assert image.pairs.shape == (0, 2)


def test_batch_truncation_drops_the_last_tokens():
    policy = mask_policy("blocks").published()
    assert policy.truncate == "batch_min"
    keys = {"seed": 5, "step": 2, "samples": range(4)}
    whole = sample_contexts(policy, (4, 8, 8), **keys).reshape(2, 4, -1)
    masks = sample_masks(policy, (4, 8, 8), **keys)
    for j in range(2):
        for ids, cu, kept in (
            (masks.context_ids, masks.context_cu, whole[j]),
            (masks.target_ids, masks.target_cu, ~whole[j]),
        ):
            shortest = kept.sum(axis=1).min()
            for b in range(4):
                got = ids[cu[j * 4 + b] : cu[j * 4 + b + 1]]
                np.testing.assert_array_equal(got, np.flatnonzero(kept[b])[:shortest])
    full = sample_masks(mask_policy("blocks"), (4, 8, 8), **keys)
    assert full.context_count.sum() + full.target_count.sum() == 2 * 4 * 4 * 64


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_hide_everything_are_an_error(backend):
    policy = MaskPolicy(sets=(MaskSet(1, (1.0, 1.0), aspect_ratio=(1.0, 1.0)),), max_attempts=3)
    with pytest.raises(
        ValueError,
        match=r"must leave context tokens, got 1 blocks of \(2, 3, 3\) on the grid \(2, 3, 3\)",
    ):
        sample_masks(policy, (2, 3, 3), seed=0, step=0, samples=[0], backend=backend)


def test_wrong_arguments_are_named():
    blocks, motion = mask_policy("blocks"), mask_policy("motion")
    with pytest.raises(ValueError, match="name must be one of blocks, motion"):
        mask_policy("block")
    with pytest.raises(ValueError, match=r"motion_maps must have shape \[1, 2, 3, 3\].*got none"):
        sample_masks(motion, (2, 3, 3), seed=0, step=0, samples=[0])
    with pytest.raises(ValueError, match="motion_maps must be finite"):
        sample_masks(
            motion,
            (2, 3, 3),
            seed=0,
            step=0,
            samples=[0],
            motion_maps=np.full((1, 2, 3, 3), np.nan),
        )
    with pytest.raises(ValueError, match="step must lie"):
        sample_masks(blocks, (2, 3, 3), seed=0, step=-1, samples=[0])
    with pytest.raises(ValueError, match="samples must be a non-empty list"):
        sample_masks(blocks, (2, 3, 3), seed=0, step=0, samples=[])
    with pytest.raises(ValueError, match=r"clip must be uint8 \[T, H, W, 3\]"):
        motion_maps([np.zeros((3, 4, 8, 8), dtype=np.uint8)], (2, 3, 3))
    with pytest.raises(ValueError, match=r"box must be .* inside the frame 8 x 8"):
        motion_maps([np.zeros((4, 8, 8, 3), dtype=np.uint8)], (2, 3, 3), boxes=[(0, 0, 9, 8)])
    with pytest.raises(ValueError, match="random_rate must lie"):
        MotionGuidance(random_rate=1.5)
    with pytest.raises(ValueError, match="batch size must be 1 or the number of time steps"):
        motion_maps(
            [np.zeros((4, 8, 8, 3), dtype=np.uint8)] * 3,
            (2, 3, 3),
            MotionGuidance(maximum="published"),
        )


def test_tubes_hide_a_place_for_half_the_clip():
    """Full-length blocks hide a place at every time."""
    grid, samples = (4, 6, 6), np.arange(16)

    def times_hidden(name):
        one = replace(mask_policy(name), sets=(replace(mask_policy(name).sets[1], num_blocks=1),))
        hidden = ~sample_contexts(one, grid, seed=0, step=0, samples=samples)[0]
        counts = hidden.sum(axis=1)
        return set(counts[counts > 0].tolist())

    assert times_hidden("blocks") == {4}
    assert times_hidden("tubes") == {2}
