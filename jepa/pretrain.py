"""Pre-training: the loop around `jepa.step.train_step`. Counts are optimiser steps and samples,
never epochs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa import distributed
from jepa.allocator import keep_freed_memory
from jepa.atomic import write_json
from jepa.batch import Batch, LoadedBatch
from jepa.checkpoint import (
    Checkpoints,
    load_training_tensors,
    training_tensors,
    warn_of_differences,
    whole,
)
from jepa.config import ConfigError, changed_keys, load, to_json, to_yaml
from jepa.data.build import GENERATED, DataConfig, build_picker
from jepa.data.clip import ClipSpec
from jepa.data.loader import Fetched, Loader, LoaderConfig, Stage
from jepa.data.mixture import Picker
from jepa.data.transforms import ViewSpec, model_input
from jepa.distributed import World
from jepa.lock import exclusive
from jepa.logs import RunLog
from jepa.models.blocks import Block
from jepa.monitor import MonitorConfig, Watch, collapse_metrics, warnings
from jepa.schedules import ScheduleConfig
from jepa.step import ModelBundle, StepConfig, TrainState, build_optimizer, new_state, train_step

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainConfig(StepConfig):
    """A whole run. The defaults are the published recipe around the micro model on moving_shapes;
    jepa/recipes.py has others."""

    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(
            total_steps=300, warmup_steps=30, momentum=0.99, final_momentum=0.999
        )
    )
    """Length of training, rates and the momentum of the EMA target."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to train on."""
    output: Path = Path("runs/pretrain")
    """Folder of checkpoints, logs and the resolved configuration."""
    batch_size: int = 8
    """Clips per process and micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    frames: int = 16
    """Frames of a clip."""
    stride: int = 2
    """Frames of the video from one frame of a clip to the next."""
    fps: float | None = None
    """Frames per second of a clip in place of `stride`; null: by stride."""
    height: int = 64
    """Height in pixels that the model sees."""
    width: int = 64
    """Width in pixels that the model sees."""
    resize: tuple[tuple[int, int, int], ...] = ()
    """[step, height, width], by rising step: another size from that optimiser step on."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Least and greatest share of the picture that a random crop covers."""
    crop_aspect: tuple[float, float] = (0.75, 1.35)
    """Least and greatest width / height of a random crop."""
    flip: float = 0.5
    """Probability of mirroring a clip."""
    seed: int = 0
    """Of weights, data order, crops and masks."""
    workers: int = 0
    """Loader processes; 0 reads in the training process."""
    device: str = "auto"
    """auto, cpu or cuda."""
    distributed: distributed.Wrapper = "auto"
    """How several processes of torchrun share the work; auto is DDP."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    compile: bool = False
    """torch.compile of every transformer block."""
    log_every: int = 10
    """Steps from one log line to the next."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next; a checkpoint also closes a log interval."""
    keep_last: int = 2
    """Checkpoints kept besides the best."""
    max_skipped: int = 10
    """Updates skipped for a gradient that is not finite before the run stops."""
    resume: bool = True
    """Go on from the newest checkpoint in `output`; false refuses a folder that has one."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """When a run is warned of as collapsing."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "accumulate",
            "frames",
            "height",
            "width",
            "log_every",
            "checkpoint_every",
            "keep_last",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"config: {name} must be at least 1, got {getattr(self, name)}.")
        steps = [step for step, _, _ in self.resize]
        if steps != sorted(set(steps)) or any(
            value < 1 for stage in self.resize for value in stage
        ):
            raise ConfigError(
                "config: resize must be (step, height, width) of at least 1 each, by rising "
                f"step, got {list(self.resize)}."
            )

    def size_at(self, step: int) -> tuple[int, int]:
        """(height, width) after `step` optimiser steps."""
        return next(
            ((height, width) for begin, height, width in reversed(self.resize) if begin <= step),
            (self.height, self.width),
        )

    @property
    def final_size(self) -> tuple[int, int]:
        """(height, width) at the end of the run: what probes and fine-tuning use."""
        return self.size_at(self.schedule.total_steps - 1)

    def views_at(self, step: int) -> ViewSpec:
        """What the model sees of a clip after `step` optimiser steps."""
        return ViewSpec(
            *self.size_at(step),
            scale=self.crop_scale,
            aspect_ratio=self.crop_aspect,
            flip=self.flip,
        )

    def _read_at(self, step: int) -> tuple[ClipSpec, ViewSpec]:
        views = self.views_at(step)
        canvas = self.size_at(step) if self.data.kind in GENERATED else views.canvas()
        return ClipSpec(self.frames, self.stride, self.fps, *canvas), views

    def loader(self, world: World) -> LoaderConfig:
        clip, views = self._read_at(0)
        return LoaderConfig(
            batch_size=self.batch_size,
            rank_independent_seed=self.variant.published_behaviour.rank_independent_seed,
            clip=clip,
            views=views,
            stages=tuple(
                Stage(step * self.accumulate, *self._read_at(step)) for step, _, _ in self.resize
            ),
            masks=self.variant.mask_policy,
            patch_size=self.model.patch_size,
            tubelet_size=self.model.tubelet_size,
            horizon=self.variant.pair_horizon,
            seed=self.seed,
            rank=world.rank,
            world=world.size,
            workers=self.workers,
            pin_memory=world.device.type == "cuda",
        )


class NotFiniteError(RuntimeError):
    """Too many updates were skipped because a gradient was not finite; `replay.json` in the run's
    folder says which batches."""


@dataclass
class _Interval:
    """What happened since the last log line: tensors on the device, read back together."""

    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    samples: list[tuple[int, list[int]]] = field(default_factory=list)
    wait_s: float = 0.0
    clips: int = 0
    began: float = field(default_factory=time.perf_counter)

    def add(self, metrics: dict[str, Tensor], step: int, parts: list[Fetched]) -> None:
        self.metrics.append(metrics)
        self.samples.append((step, [i for part in parts for i in part.batch.sample_ids.tolist()]))
        self.wait_s += sum(part.wait_s for part in parts)
        self.clips += sum(len(part.batch.clips) for part in parts)

    def read(self, world: distributed.World) -> tuple[dict[str, float], list[int]]:
        """Means over the interval, and the steps that were skipped: the one read of the interval.

        A mean is over the steps that have the metric and where it is finite, NaN when there is
        none; `skipped` is a count.
        """
        names = sorted({name for metrics in self.metrics for name in metrics})
        absent = self.metrics[0]["loss"].new_zeros((), dtype=torch.float32)
        table = torch.stack(
            [
                torch.stack([m.get(name, absent).detach().float() for name in names])
                for m in self.metrics
            ]
        )
        if world.reduce is not None:
            shares = [i for i, name in enumerate(names) if name not in ("gradient_norm", "skipped")]
            table[:, shares] = world.reduce(table[:, shares].contiguous())
        table = table.cpu()
        present = torch.tensor([[name in metrics for name in names] for metrics in self.metrics])
        counted = present & table.isfinite()
        means = torch.where(counted, table, 0.0).sum(0) / counted.sum(0)
        values = dict(zip(names, means.tolist()))
        flags = table[:, names.index("skipped")] > 0
        values["skipped"] = float(flags.sum())
        return values, [step for (step, _), flag in zip(self.samples, flags.tolist()) if flag]


def run(cfg: PretrainConfig) -> TrainState:
    """Trains to `schedule.total_steps`, or goes on from the newest checkpoint.

    Returns:
        The state after the last step.

    Raises:
        ConfigError, MissingDataError: before anything is written. NotFiniteError,
            TooManyBadFilesError: during the run.
    """
    repeat_stills = cfg.data.repeat_stills or cfg.variant.published_behaviour.repeat_stills
    picker = build_picker(replace(cfg.data, repeat_stills=repeat_stills))
    world = distributed.start(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(cfg.seed)
    try:
        with exclusive(cfg.output) if world.leads else nullcontext():
            return _run(cfg, picker, world)
    finally:
        distributed.stop(world)


def _run(cfg: PretrainConfig, picker: Picker, world: distributed.World) -> TrainState:
    checkpoints = Checkpoints(cfg.output / "checkpoints", cfg.keep_last)
    if not cfg.resume and checkpoints.steps():
        raise ConfigError(
            f"config: output must hold no checkpoints where resume is off, got {cfg.output} at "
            f"step {checkpoints.steps()[-1]}."
        )
    if world.leads:
        checkpoints.tidy()
    state = new_state(cfg, world.device)
    state.reduce, state.ranks = world.reduce, world.size
    if cfg.compile:
        compile_blocks(state.bundle)
    state.wrapped = distributed.wrap(state.bundle, world, cfg.distributed)
    # After the wrapper, which may have replaced the parameters by shards.
    state.optimizer = build_optimizer(state.bundle, cfg)
    skipped = _restore(state, checkpoints, cfg) if checkpoints.steps() else 0
    cfg.output.mkdir(parents=True, exist_ok=True)
    log = RunLog(cfg.output, state.step, active=world.leads)
    if world.leads:
        (cfg.output / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
        log.headline(_summary(cfg, state, world))
    with log:
        _loop(cfg, state, picker, world, checkpoints, log, skipped)
    return state


def _loop(
    cfg: PretrainConfig,
    state: TrainState,
    picker: Picker,
    world: distributed.World,
    checkpoints: Checkpoints,
    log: RunLog,
    skipped_total: int,
) -> None:
    total = cfg.schedule.total_steps
    loader = Loader(
        picker, cfg.loader(world), min(state.step, total) * cfg.accumulate, total * cfg.accumulate
    )
    interval, losses = _Interval(), []
    watch = Watch(cfg.monitor, total)
    for parts in _grouped(iter(loader), cfg.accumulate):
        batches = [prepared(part.batch, cfg, world.device, state.step) for part in parts]
        _, metrics = train_step(state, batches)
        interval.add(metrics, state.step, parts)
        saves = state.step % cfg.checkpoint_every == 0 or state.step == total
        # An interval never spans a checkpoint, so that a resumed run writes the lines of an
        # uninterrupted one.
        if state.step % cfg.log_every == 0 or saves:
            values, skipped = interval.read(world)
            losses.append(values["loss"])
            skipped_total += len(skipped)
            _report(cfg, state, interval, values, batches[0], parts[-1], log, watch)
            if skipped:
                _replay(cfg, interval, skipped, skipped_total, world)
            interval = _Interval()
        if saves:
            save(state, checkpoints, cfg, world, sum(losses) / len(losses), skipped_total)
            losses = []


def compile_blocks(bundle: ModelBundle, backend: str = "inductor") -> None:
    """Compiles the transformer blocks in place, any token count: the one part of a step whose
    shapes are all that changes."""
    for module in bundle.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True, backend=backend)


def prepared(loaded: LoadedBatch, cfg: PretrainConfig, device: torch.device, step: int) -> Batch:
    """What optimiser step `step` takes: the loader's batch on the device, views cut out and
    normalised there."""
    loaded = loaded.to(device, non_blocking=True)
    return loaded.for_step(model_input(loaded, cfg.views_at(step)), step)


def _grouped(fetched: Iterator[Fetched], size: int) -> Iterator[list[Fetched]]:
    group: list[Fetched] = []
    for one in fetched:
        group.append(one)
        if len(group) == size:
            yield group
            group = []


def _report(
    cfg: PretrainConfig,
    state: TrainState,
    interval: _Interval,
    values: dict[str, float],
    batch: Batch,
    last: Fetched,
    log: RunLog,
    watch: Watch,
) -> None:
    seconds = time.perf_counter() - interval.began
    watched = {
        name: float(value)
        for name, value in collapse_metrics(state.bundle, batch, cfg, cfg.monitor).items()
    }
    sentences = warnings(watched, cfg.monitor)
    sentences += watch.sentences({"step": state.step, **values, **watched})
    for sentence in sentences:
        _log.warning("step %d: %s", state.step, sentence)
    line = {
        "step": state.step,
        "samples": state.step * cfg.batch_size * cfg.accumulate * state.ranks,
        **values,
        **watched,
        "learning_rate": cfg.schedule.learning_rate(state.step),
        "clips_per_s": interval.clips * state.ranks / seconds,
        "data_wait_share": interval.wait_s / seconds,
        "bad_files": last.bad_total,
    }
    log.write(line, cfg.schedule.total_steps)


def _replay(
    cfg: PretrainConfig,
    interval: _Interval,
    skipped: list[int],
    total: int,
    world: distributed.World,
) -> None:
    """Names the batches whose gradient was not finite; stops the run past the limit."""
    path = cfg.output / "replay.json"
    if world.leads:
        found = [
            {"seed": cfg.seed, "step": step, "sample_ids": ids}
            for step, ids in interval.samples
            if step in skipped
        ]
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        # A resumed run may come by a step again.
        write_json(
            path, [entry for entry in earlier if entry["step"] < interval.samples[0][0]] + found
        )
        _log.warning(
            "skipped the update of steps %s: a gradient was not finite (batches in %s)",
            skipped,
            path,
        )
    if total > cfg.max_skipped:
        raise NotFiniteError(
            f"pretrain: at most {cfg.max_skipped} updates may be skipped for a gradient that is "
            f"not finite, got {total}; "
            f"{path} names the batches."
        )


def save(
    state: TrainState,
    checkpoints: Checkpoints,
    cfg: PretrainConfig,
    world: distributed.World,
    score: float | None = None,
    skipped: int = 0,
) -> None:
    """Writes a checkpoint from the first process."""
    model, moments = training_tensors(state.bundle, state.optimizer)
    if world.leads:
        checkpoints.save(
            state.step, model, moments, {"skipped": skipped, "config": to_json(cfg)}, score
        )
    world.barrier()


def _restore(state: TrainState, checkpoints: Checkpoints, cfg: PretrainConfig) -> int:
    """Goes on from the newest checkpoint; returns how many updates had been skipped before."""
    model, moments, saved = checkpoints.load()
    if cfg.variant.published_behaviour.resume_drops_heads:
        model, moments = _without_heads(state.bundle, model, moments)
    load_training_tensors(state.bundle, state.optimizer, model, moments)
    state.step = saved["step"]
    warn_of_differences(saved["environment"])
    for key in changed_keys(saved.get("config", {}), to_json(cfg)):
        _log.warning("resuming with another value of %s than the run was started with", key)
    _log.info("resumed from step %d of %s", state.step, checkpoints.folder)
    return int(saved.get("skipped", 0))


def _without_heads(
    bundle: ModelBundle, model: dict[str, Tensor], moments: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint whose heads are as new: the bundle's present weights, and no moments. The
    published code does so."""
    fresh = {
        name: whole(value)
        for name, value in bundle.state_dict().items()
        if name.startswith("heads.")
    }
    kept = {
        name: value
        for name, value in moments.items()
        if not name.partition("/")[2].startswith("heads.")
    }
    return {**model, **fresh}, kept


def _summary(cfg: PretrainConfig, state: TrainState, world: distributed.World) -> dict[str, Any]:
    schedule = cfg.schedule
    clips = cfg.batch_size * cfg.accumulate * world.size
    return {
        "objectives": ", ".join(
            f"{name} x {c.weight:g}" for name, c in cfg.variant.objectives.items() if c.weight
        ),
        "target": cfg.variant.target.kind,
        "data": f"{cfg.data.kind}, {cfg.frames} frames of {cfg.height} x {cfg.width}"
        + "".join(
            f", of {height} x {width} after step {step}" for step, height, width in cfg.resize
        ),
        "model": f"{sum(p.numel() for p in state.bundle.context_encoder.parameters()) / 1e6:.2f} "
        "M encoder parameters",
        "steps": f"{schedule.total_steps} of {clips} clips ({schedule.total_steps * clips} "
        f"samples), from step {state.step}",
        "rate": f"{schedule.initial_rate:g} -> {schedule.rate:g} over {schedule.warmup_steps} "
        f"steps -> {schedule.final_rate:g}",
        "ema": f"{schedule.momentum:g} -> {schedule.final_momentum:g}",
        "precision": cfg.precision,
        "device": f"{world.device} x {world.size}",
        "output": str(cfg.output),
    }


def load_config(folder: str | Path) -> PretrainConfig:
    """The configuration a run was started with."""
    return load(PretrainConfig, Path(folder) / "config.yaml")
