"""Batches for training steps, read by worker processes. Step n is a pure function of (seed, n), so
a resume starts at any step."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from jepa.batch import LoadedBatch, MaskBatch, Views
from jepa.counter_rng import Stream, stream_id, uniforms
from jepa.data.clip import BadClipError, Clip, ClipSpec
from jepa.data.mixture import Pick, Picker
from jepa.data.transforms import ViewSpec, centre_views, random_views
from jepa.masks import MaskPolicy, motion_maps, sample_masks
from jepa.masks.motion import Box

_log = logging.getLogger(__name__)

# Samples tried in place of a bad one before the step gives up.
_REPLACEMENTS = 20


@dataclass(frozen=True)
class Stage:
    """From loader step `step` on, clips and views are of another size."""

    step: int
    clip: ClipSpec
    views: ViewSpec | None


@dataclass(frozen=True)
class LoaderConfig:
    """What a batch looks like and how it is read.

    `views` None leaves clips whole; `random` False takes centred views and the middle of each
    video. `masks` None samples none. Ranks share one global batch: rank r of `world` reads places
    r*batch_size .. (r+1)*batch_size-1, and each place has random numbers of its own. With
    `rank_independent_seed` (as the published code does) all ranks draw those of rank 0 for their
    own samples. `stages`, by rising step, change the size within a run. A sample that cannot be
    read makes way for another one, or with `substitutes` False is left out of its batch.
    """

    batch_size: int = 8
    clip: ClipSpec = field(default_factory=ClipSpec)
    views: ViewSpec | None = field(default_factory=ViewSpec)
    random: bool = True
    masks: MaskPolicy | None = field(default_factory=MaskPolicy)
    patch_size: int = 16
    tubelet_size: int = 2
    horizon: int = 1
    seed: int = 0
    rank: int = 0
    world: int = 1
    rank_independent_seed: bool = False
    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    max_bad_share: float = 0.05
    judge_after: int = 100
    substitutes: bool = True
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        steps = [stage.step for stage in self.stages]
        if steps != sorted(set(steps)) or (steps and steps[0] < 0):
            raise ValueError(
                f"LoaderConfig: stages must begin at rising steps from 0 on, got {steps}."
            )
        for step in steps:
            self.at(step)
        for name in (
            "batch_size",
            "patch_size",
            "tubelet_size",
            "horizon",
            "world",
            "prefetch",
            "judge_after",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"LoaderConfig: {name} must be at least 1, got {getattr(self, name)}."
                )
        if not 0 <= self.rank < self.world:
            raise ValueError(f"LoaderConfig: rank must lie in [0, {self.world}), got {self.rank}.")
        if self.workers < 0:
            raise ValueError(f"LoaderConfig: workers must not be negative, got {self.workers}.")
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ValueError(
                f"LoaderConfig: max_bad_share must lie in [0, 1], got {self.max_bad_share}."
            )
        height, width = self.frame_size()
        if self.masks is not None and (height % self.patch_size or width % self.patch_size):
            raise ValueError(
                f"LoaderConfig: frame must be whole patches of {self.patch_size} px, got {height} "
                f"x {width}."
            )
        if (
            self.masks is not None
            and self.clip.frames % self.tubelet_size
            and self.clip.frames != 1
        ):
            raise ValueError(
                f"LoaderConfig: clip.frames must be whole tubelets of {self.tubelet_size}, got "
                f"{self.clip.frames}."
            )

    def at(self, step: int) -> LoaderConfig:
        """What is in force at a loader step."""
        begun = [stage for stage in self.stages if stage.step <= step]
        return (
            replace(self, clip=begun[-1].clip, views=begun[-1].views, stages=()) if begun else self
        )

    def frame_size(self) -> tuple[int, int]:
        """(height, width) that the model sees."""
        return (
            (self.views.height, self.views.width)
            if self.views is not None
            else (self.clip.height, self.clip.width)
        )

    def grid(self, frames: int) -> tuple[int, int, int]:
        """Token grid of a clip of `frames` frames; a single frame is an image with T = 1."""
        height, width = self.frame_size()
        return (
            1 if frames == 1 else frames // self.tubelet_size,
            height // self.patch_size,
            width // self.patch_size,
        )


class TooManyBadFilesError(RuntimeError):
    """More files failed to decode than the configuration allows."""


@dataclass
class Fetched:
    """A batch and what it cost: seconds that the training loop waited for it, and the files that
    failed (with the reason)."""

    batch: LoadedBatch
    wait_s: float
    bad_files: tuple[str, ...]
    bad_total: int
    read_total: int


@dataclass
class _Step:
    """What travels from a worker: pinned as a whole by the loader's pinning thread."""

    batch: LoadedBatch | None  # None: no sample of the step could be read
    bad_files: tuple[str, ...]

    def pin_memory(self) -> Self:
        if self.batch is not None:
            self.batch = self.batch.pin_memory()
        return self


class StepDataset(Dataset[_Step]):
    """Item n is the batch of step n."""

    def __init__(self, picker: Picker, config: LoaderConfig) -> None:
        self.picker, self.config = picker, config

    def __getitem__(self, step: int) -> _Step:
        config = self.config.at(step)
        slots = config.rank * config.batch_size + np.arange(config.batch_size, dtype=np.int64)
        picks = self.picker.pick(config.seed, step, slots, config.world * config.batch_size)
        if not picks:
            raise IndexError(
                f"StepDataset: step must have samples, got step {step} past the end of the list."
            )
        slots = slots[: len(picks)]
        if config.rank_independent_seed:
            slots = slots - config.rank * config.batch_size
        starts = np.full(len(picks), 0.5)
        if config.random:
            starts = uniforms(config.seed, step, slots, stream_id(Stream.CLIP_START), 1)[:, 0]
        bad: list[str] = []
        read = [
            self._read(config, pick, int(slot), step, start, bad)
            for pick, slot, start in zip(picks, slots, starts, strict=True)
        ]
        kept = [place for place, one in enumerate(read) if one is not None]
        if not kept:
            return _Step(None, tuple(bad))
        slots, found = slots[kept], [one for one in read if one is not None]
        picks, clips = [pick for pick, _ in found], [clip for _, clip in found]
        views = self._views(config, step, slots, picks, clips)
        frames = self._frames(config, clips)
        labels = torch.tensor([pick.dataset.label(pick.index) for pick in picks], dtype=torch.int64)
        ids = torch.tensor([pick.sample_id for pick in picks], dtype=torch.int64)
        masks = self._masks(config, step, slots, frames, views)
        return _Step(LoadedBatch(torch.from_numpy(frames), labels, ids, masks, views), tuple(bad))

    def _read(
        self, config: LoaderConfig, pick: Pick, slot: int, step: int, start: float, bad: list[str]
    ) -> tuple[Pick, Clip] | None:
        """The clip of a pick; a bad file makes way for other samples of the same data set, in an
        order fixed by the keys, or for none."""
        first = pick
        for attempt in range(_REPLACEMENTS + 1):
            try:
                return pick, pick.dataset.read(pick.index, config.clip, float(start))
            except BadClipError as error:
                bad.append(str(error))
                if not config.substitutes:
                    return None
                number = uniforms(
                    config.seed, step, np.int64(slot), stream_id(Stream.REPLACEMENT), 1, 2 * attempt
                ).item()
                index = int(number * len(first.dataset))
                pick = Pick(first.dataset, index, first.sample_id - first.index + index)
        raise TooManyBadFilesError(
            f"{first.dataset.name}: {_REPLACEMENTS + 1} samples in a row could not be read at "
            f"step {step}; the last was {bad[-1]}."
        )

    def _frames(self, config: LoaderConfig, clips: list[Clip]) -> np.ndarray:
        frames = [clip.frames for clip in clips]
        if self.picker.repeat_stills:
            length = config.clip.frames
            frames = [np.repeat(one, length, axis=0) if len(one) == 1 else one for one in frames]
        return np.stack(frames)

    def _views(
        self,
        config: LoaderConfig,
        step: int,
        slots: np.ndarray,
        picks: list[Pick],
        clips: list[Clip],
    ) -> Views | None:
        if config.views is None:
            return None
        sizes = [(clip.source_height, clip.source_width) for clip in clips]
        if not config.random:
            return centre_views(config.views, sizes)
        may_flip = [pick.dataset.may_flip(pick.index) for pick in picks]
        return random_views(
            config.views,
            seed=config.seed,
            step=step,
            samples=slots,
            source_sizes=sizes,
            may_flip=may_flip,
        )

    def _masks(
        self,
        config: LoaderConfig,
        step: int,
        slots: np.ndarray,
        frames: np.ndarray,
        views: Views | None,
    ) -> MaskBatch | None:
        if config.masks is None:
            return None
        grid = config.grid(frames.shape[1])
        maps = None
        if config.masks.motion is not None:
            boxes = flips = None
            if views is not None:
                boxes = _pixel_boxes(views, frames.shape[2], frames.shape[3])
                flips = views.flips.tolist()
            maps = motion_maps(list(frames), grid, config.masks.motion, boxes=boxes, flips=flips)
        return sample_masks(
            config.masks,
            grid,
            seed=config.seed,
            step=step,
            samples=slots,
            motion_maps=maps,
            horizon=config.horizon,
        )


class Loader:
    """Iterates over steps start .. stop-1.

    Bad files are counted and each is named once in the log; when more than `max_bad_share` of at
    least `judge_after` reads failed, the run stops with TooManyBadFilesError. Iterating again
    starts over at `start`.
    """

    def __init__(self, picker: Picker, config: LoaderConfig, start: int, stop: int) -> None:
        if not 0 <= start <= stop:
            raise ValueError(f"Loader: steps must be 0 <= start <= stop, got {start} and {stop}.")
        self.picker, self.config, self.start, self.stop = picker, config, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Fetched]:
        config = self.config
        steps = DataLoader(
            StepDataset(self.picker, config),
            batch_size=None,
            sampler=range(self.start, self.stop),
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            pin_memory=config.pin_memory,
            collate_fn=_unchanged,
            # A generator of its own: the workers' seeds, which nothing reads, must not advance the
            # global one of the training process.
            generator=torch.Generator(),
        )
        named: set[str] = set()
        bad_total = read_total = 0
        iterator = iter(steps)
        while True:
            began = time.perf_counter()
            step = next(iterator, None)
            wait = time.perf_counter() - began
            if step is None:
                return
            bad_total += len(step.bad_files)
            good = 0 if step.batch is None else len(step.batch.clips)
            read_total += good + len(step.bad_files)
            for reason in step.bad_files:
                if reason not in named:
                    named.add(reason)
                    _log.warning("skipped a file that could not be read: %s", reason)
            if read_total >= config.judge_after and bad_total > config.max_bad_share * read_total:
                raise TooManyBadFilesError(
                    f"loader: at most {config.max_bad_share:.1%} of the files may be unreadable, "
                    f"got {bad_total} of {read_total} reads; "
                    f"{len(named)} different ones, among them {sorted(named)[0]}."
                )
            if step.batch is None:
                continue
            yield Fetched(step.batch, wait, step.bad_files, bad_total, read_total)


def _unchanged(step: Any) -> Any:
    return step


def _pixel_boxes(views: Views, height: int, width: int) -> list[Box]:
    """Boxes in pixels of the canvas, cut at its edge where the rounding of shares would cross
    it."""
    boxes = views.boxes.numpy().astype(np.float64) * np.array([height, width, height, width])
    boxes[:, 2:] = np.minimum(boxes[:, 2:], np.array([height, width]) - boxes[:, :2])
    return [(top, left, tall, wide) for top, left, tall, wide in boxes.tolist()]
