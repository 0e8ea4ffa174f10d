"""The loader: the same batches for any number of workers, ranks and restarts; bad files; views
against torch's own resampling."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from jepa.batch import LoadedBatch, MaskBatch, Views
from jepa.data.clip import BadClipError, Clip, ClipSpec
from jepa.data.files import FileClips
from jepa.data.loader import Loader, LoaderConfig, Stage, TooManyBadFilesError
from jepa.data.mixture import Epochs, InOrder, Mixture
from jepa.data.moving_shapes import MovingShapes
from jepa.data.pathlist import pathlist
from jepa.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ViewSpec,
    centre_views,
    cut_views,
    model_input,
    random_views,
    whole_views,
)
from jepa.data.ucf101 import ucf101
from jepa.masks import mask_policy, motion_maps
from jepa_kernels.testing import FLOAT32_CROPS, FLOAT32_NEAR_ZERO, FLOAT32_STORED

SHAPES = LoaderConfig(
    batch_size=4,
    clip=ClipSpec(8, 1, None, 32, 32),
    views=ViewSpec(16, 24),
    patch_size=8,
    masks=mask_policy("motion"),
    seed=3,
)


class Noise:
    """A data set of random bytes, some of which cannot be read."""

    name, num_classes, still = "noise", 5, False

    def __init__(self, size, bad=(), frames=8, still=False):
        self.size, self.bad, self.frames, self.still = size, set(bad), frames, still

    def __len__(self):
        return self.size

    def label(self, index):
        return index % 5

    def may_flip(self, index):
        return index % 2 == 0

    def where(self, index):
        return f"noise/{index}"

    def read(self, index, spec, draw):
        if index in self.bad:
            raise BadClipError(f"noise/{index}: broken")
        frames = np.random.default_rng(index).integers(
            0, 256, (self.frames, spec.height, spec.width, 3), dtype=np.uint8
        )
        return Clip(frames, 30, 40)


def tensors(batch: LoadedBatch) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    for part in (batch.masks, batch.views):
        if part is not None:
            found |= {
                f"{type(part).__name__}.{name}": value
                for name, value in vars(part).items()
                if isinstance(value, torch.Tensor)
            }
    return found


def assert_same(first: LoadedBatch, second: LoadedBatch):
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    assert len(one) >= 3 + 18
    for name in one:
        assert torch.equal(one[name], two[name]), name


def batches(config, start, stop, picker=None):
    return [
        fetched.batch
        for fetched in Loader(picker or Epochs(MovingShapes(50, seed=1)), config, start, stop)
    ]


def changed(config, **values):
    return LoaderConfig(**{**vars(config), **values})


def test_workers_and_restarts_do_not_change_batches():
    alone = batches(SHAPES, 0, 4)
    for first, second in zip(alone, batches(changed(SHAPES, workers=2), 0, 4), strict=True):
        assert_same(first, second)
    assert_same(alone[3], batches(SHAPES, 3, 4)[0])
    assert not torch.equal(alone[0].masks.context_ids[:50], alone[1].masks.context_ids[:50])


def test_reading_leaves_the_global_generators_alone():
    before = torch.random.get_rng_state()
    batches(changed(SHAPES, workers=1), 0, 1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_two_ranks_share_the_batch_of_one():
    whole = batches(changed(SHAPES, batch_size=4), 2, 3)[0]
    halves = [
        batches(changed(SHAPES, batch_size=2, rank=rank, world=2), 2, 3)[0] for rank in (0, 1)
    ]
    assert torch.equal(whole.clips, torch.cat([half.clips for half in halves]))
    assert torch.equal(whole.sample_ids, torch.cat([half.sample_ids for half in halves]))
    assert torch.equal(whole.views.boxes, torch.cat([half.views.boxes for half in halves]))
    for j in (0, 1):
        for b in range(4):
            half = halves[b // 2].masks
            at, there = j * 4 + b, j * 2 + b % 2
            one = whole.masks.context_ids[
                whole.masks.context_cu[at] : whole.masks.context_cu[at + 1]
            ]
            assert torch.equal(
                one, half.context_ids[half.context_cu[there] : half.context_cu[there + 1]]
            )


@pytest.mark.parametrize("published", [False, True])
def test_ranks_draw_numbers_of_their_own_unless_the_published_ones_are_asked_for(published):
    config = changed(
        SHAPES, batch_size=2, world=2, rank_independent_seed=published, masks=mask_policy("blocks")
    )
    first, second = (batches(changed(config, rank=rank), 2, 3)[0] for rank in (0, 1))
    assert not set(first.sample_ids.tolist()) & set(second.sample_ids.tolist())
    assert torch.equal(first.views.boxes, second.views.boxes) == published
    assert (first.masks.context_ids.tolist() == second.masks.context_ids.tolist()) == published
    alone = batches(changed(config, rank_independent_seed=False), 2, 3)[0]
    assert_same(first, alone)


def test_stages_change_the_size_from_their_step_on():
    small = Stage(2, ClipSpec(8, 1, None, 24, 24), ViewSpec(8, 16))
    staged = batches(changed(SHAPES, stages=(small,)), 0, 4)
    assert_same(staged[1], batches(SHAPES, 1, 2)[0])
    assert_same(staged[3], batches(changed(SHAPES, clip=small.clip, views=small.views), 3, 4)[0])
    assert [batch.masks.grid for batch in staged] == [(4, 2, 3), (4, 2, 3), (4, 1, 2), (4, 1, 2)]
    with pytest.raises(
        ValueError, match=r"stages must begin at rising steps from 0 on, got \[2, 2\]"
    ):
        changed(SHAPES, stages=(small, small))
    with pytest.raises(ValueError, match="frame must be whole patches of 8 px, got 9 x 16"):
        changed(SHAPES, stages=(Stage(1, small.clip, ViewSpec(9, 16)),))


def test_motion_masks_see_the_view_that_the_model_sees():
    """The map is that of the cropped and mirrored picture: compare with a clip that is cut out
    first."""
    config = changed(
        SHAPES, views=ViewSpec(16, 16, scale=(0.3, 0.6)), clip=ClipSpec(8, 1, None, 64, 64)
    )
    batch = batches(config, 0, 1)[0]
    views = Views(batch.views.boxes, torch.tensor([True, False, True, False]))
    boxes = (batch.views.boxes.double() * 64).tolist()
    maps = motion_maps(
        list(batch.clips.numpy()),
        (4, 2, 2),
        boxes=[tuple(b) for b in boxes],
        flips=views.flips.tolist(),
    )
    cut = cut_views(batch.clips, views, ViewSpec(16, 16, mean=(0, 0, 0), std=(1, 1, 1)))
    seen = motion_maps(list(cut.numpy()), (4, 2, 2))
    moving = maps.reshape(4, -1).max(axis=1) > 0
    assert moving.sum() >= 2
    correlations = [
        np.corrcoef(maps[b].ravel(), seen[b].ravel())[0, 1]
        for b in range(4)
        if moving[b] and seen[b].max() > 0
    ]
    assert min(correlations) > 0.9


def test_bad_files_are_replaced_counted_and_named(caplog):
    picker = Epochs(Noise(40, bad=[7, 11]))
    config = changed(SHAPES, max_bad_share=0.5, masks=None)
    with caplog.at_level(logging.WARNING):
        fetched = list(Loader(picker, config, 0, 20))
    ids = torch.cat([f.batch.sample_ids for f in fetched]).tolist()
    assert len(ids) == 80
    assert not {7, 11} & set(ids)
    assert fetched[-1].bad_total == sum(len(f.bad_files) for f in fetched) >= 4
    assert fetched[-1].read_total == 80 + fetched[-1].bad_total
    assert [r.getMessage() for r in caplog.records].count(
        "skipped a file that could not be read: noise/7: broken"
    ) == 1
    again = torch.cat(
        [f.batch.sample_ids for f in Loader(picker, changed(config, workers=1), 0, 20)]
    ).tolist()
    assert ids == again
    assert all(f.wait_s >= 0 for f in fetched)


def test_too_many_bad_files_stop_the_run():
    picker = Epochs(Noise(40, bad=range(0, 40, 8)))
    with pytest.raises(
        TooManyBadFilesError,
        match=r"at most 5.0% of the files may be unreadable, got \d+ of \d+ reads; \d different "
        r"ones",
    ):
        list(Loader(picker, changed(SHAPES, judge_after=30, masks=None), 0, 50))
    with pytest.raises(
        TooManyBadFilesError, match="21 samples in a row could not be read at step 0"
    ):
        list(Loader(Epochs(Noise(4, bad=range(4))), changed(SHAPES, workers=1), 0, 1))


def test_a_corrupt_video_is_replaced(shared_dir, tmp_path):
    folder = shared_dir / "clips" / "decode"
    (tmp_path / "list.txt").write_text("decord_corrupted.mp4 1\nh265_video.mp4 0\n")
    config = LoaderConfig(
        batch_size=2, clip=ClipSpec(4, 2, None, 32, 32), views=None, masks=None, max_bad_share=0.9
    )
    fetched = next(iter(Loader(Epochs(pathlist(tmp_path / "list.txt", folder)), config, 0, 1)))
    assert fetched.batch.labels.tolist() == [0, 0]
    assert fetched.bad_total >= 1
    assert all("decord_corrupted.mp4" in reason for reason in fetched.bad_files)


def test_stills_have_one_step_in_time_or_are_repeated():
    parts = (Noise(9), Noise(9, frames=1, still=True))
    config = changed(SHAPES, masks=mask_policy("blocks"))
    shapes = {
        (b.clips.shape[1], b.masks.grid) for b in batches(config, 0, 12, Mixture(parts, (0.5, 0.5)))
    }
    assert shapes == {(8, (4, 2, 3)), (1, (1, 2, 3))}
    repeated = batches(config, 0, 6, Mixture(parts, (0.5, 0.5), repeat_stills=True))
    assert {b.clips.shape[1] for b in repeated} == {8}
    still = [(clip == clip[:1]).all().item() for b in repeated for clip in b.clips]
    assert 0 < sum(still) < len(still)


def test_epochs_of_stills_can_be_repeated_too():
    config = changed(SHAPES, masks=mask_policy("blocks"))
    for repeat in (False, True):
        batch = batches(config, 0, 1, Epochs(Noise(9, frames=1, still=True), repeat_stills=repeat))[
            0
        ]
        assert batch.clips.shape[1] == (8 if repeat else 1)
        assert batch.masks.grid[0] == (4 if repeat else 1)


def test_real_clips_for_evaluation(shared_dir):
    folder = shared_dir / "clips" / "ucf101"
    data = ucf101(
        folder / "videos",
        shared_dir / "clips" / "ucf101_splits",
        list_file=folder / "testlist01_subset.txt",
    )
    small = FileClips(data.name, data.root, data.files[:5], data.labels[:5], 101)
    view = ViewSpec(32, 32)
    config = LoaderConfig(
        batch_size=4,
        clip=ClipSpec(4, 2, None, *view.canvas()),
        views=view,
        random=False,
        masks=None,
    )
    picker = InOrder(small)
    read = batches(config, 0, picker.steps(4), picker)
    assert [len(b.clips) for b in read] == [4, 1]
    assert torch.cat([b.labels for b in read]).tolist() == data.labels[:5]
    pixels = model_input(read[0], view)
    assert pixels.shape == (4, 3, 4, 32, 32)
    assert torch.isfinite(pixels).all()
    assert (Path(data.where(0))).exists()


@pytest.mark.parametrize(
    ("size", "box", "flip"),
    [
        ((16, 20), (5, 7, 20, 30), False),
        ((12, 12), (0, 0, 9, 7), True),
        ((10, 6), (0, 0, 30, 41), True),
    ],
)
def test_views_equal_crop_and_antialiased_resize(size, box, flip):
    clips = torch.randint(0, 256, (1, 3, 30, 41, 3), dtype=torch.uint8)
    top, left, height, width = box
    views = Views(
        torch.tensor([[top / 30, left / 41, height / 30, width / 41]]), torch.tensor([flip])
    )
    got = cut_views(clips, views, ViewSpec(*size))
    pixels = clips[0].permute(0, 3, 1, 2).double()[:, :, top : top + height, left : left + width]
    want = (
        functional.interpolate(pixels, size=size, mode="bilinear", antialias=True).permute(
            1, 0, 2, 3
        )
        / 255
    )
    want = (want.flip(-1) if flip else want) - torch.tensor(IMAGENET_MEAN).double()[
        :, None, None, None
    ]
    want = want / torch.tensor(IMAGENET_STD).double()[:, None, None, None]
    torch.testing.assert_close(got[0].double(), want, **FLOAT32_CROPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cut_views(clips, views, ViewSpec(*size)), got)


def test_whole_views_are_the_identity():
    clips = torch.randint(0, 256, (2, 3, 8, 12, 3), dtype=torch.uint8)
    torch.testing.assert_close(
        cut_views(clips, whole_views(2), ViewSpec(8, 12)),
        cut_views(clips, None, ViewSpec(8, 12)),
        **FLOAT32_NEAR_ZERO,
    )
    loaded = LoadedBatch(clips, torch.zeros(2).long(), torch.arange(2), None, None)
    assert torch.equal(
        model_input(loaded, ViewSpec(8, 12)), cut_views(clips, None, ViewSpec(8, 12))
    )
    with pytest.raises(
        ValueError, match=r"clips must be uint8 \[B, T, H, W, 3\], got torch.float32"
    ):
        cut_views(torch.randn(2, 3, 3, 8, 12), None, ViewSpec())


def test_random_views_stay_inside_and_in_range():
    spec = ViewSpec(32, 32, scale=(0.2, 0.9))
    sizes = np.tile([[240, 320], [100, 400]], (500, 1))
    may_flip = np.arange(1000) % 3 > 0
    views = random_views(
        spec, seed=1, step=2, samples=np.arange(1000), source_sizes=sizes, may_flip=may_flip
    )
    boxes, slack = views.boxes.double().numpy(), FLOAT32_STORED["atol"]
    assert boxes.min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 1 + slack
    area, ratio = boxes[:, 2] * boxes[:, 3], boxes[:, 3] * sizes[:, 1] / (boxes[:, 2] * sizes[:, 0])
    assert ratio.min() > 0.75 - slack
    assert ratio.max() < 1.35 + slack
    assert area[::2].min() > 0.2 - slack
    assert area[::2].max() < 0.9 + slack
    assert not views.flips.numpy()[~may_flip].any()
    assert 0.4 < views.flips.numpy()[may_flip].mean() < 0.6
    again = random_views(spec, seed=1, step=2, samples=[7, 3], source_sizes=sizes[[7, 3]])
    assert torch.equal(again.boxes, views.boxes[[7, 3]])
    centred = centre_views(ViewSpec(20, 10), [[240, 320], [300, 100]]).boxes.double().numpy()
    np.testing.assert_allclose(
        centred, [[0, 0.3125, 1, 0.375], [1 / 6, 0, 2 / 3, 1]], **FLOAT32_STORED
    )


def test_pinning_and_moving_keep_every_field():
    batch = batches(SHAPES, 0, 1)[0]
    moved = batch.to("meta")
    assert tensors(moved).keys() == tensors(batch).keys()
    assert all(t.device.type == "meta" for t in tensors(moved).values())
    assert isinstance(moved.masks, MaskBatch)


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match="frame must be whole patches of 16 px, got 20 x 32"):
        LoaderConfig(views=ViewSpec(20, 32))
    with pytest.raises(ValueError, match=r"clip.frames must be whole tubelets of 2, got 7"):
        LoaderConfig(clip=ClipSpec(7))
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 1\), got 1"):
        LoaderConfig(rank=1)
    with pytest.raises(ValueError, match="scale must be"):
        ViewSpec(scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="weights must be one per data set"):
        Mixture((Noise(3),), (0.5, 0.5))
