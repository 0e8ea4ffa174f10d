"""Fine-tuning on labelled clips: the run's encoder and an attentive pooler, rates that fall layer
by layer, the objective kept on or not."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from jepa import distributed
from jepa.allocator import keep_freed_memory
from jepa.atomic import write_json
from jepa.checkpoint import (
    Checkpoints,
    load_training_tensors,
    read_state,
    training_tensors,
    warn_of_differences,
)
from jepa.config import ConfigError, changed_keys, to_json
from jepa.data.build import GENERATED, DataConfig, build_dataset
from jepa.data.clip import ClipDataset, labelled
from jepa.data.loader import Loader
from jepa.data.mixture import Epochs
from jepa.data.transforms import model_input
from jepa.evaluation import InputSpec, Which, content, load_bundle, wilson
from jepa.lock import exclusive
from jepa.models.probes import Probe
from jepa.pretrain import PretrainConfig
from jepa.schedules import cosine
from jepa.step import (
    Mark,
    ModelBundle,
    StepConfig,
    clip_gradients,
    loss_step,
    precision,
    unmarked,
)
from jepa.target import update_ema

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneConfig:
    """What to fine-tune and how."""

    run: Path = Path("runs/pretrain")
    """Folder of the pre-training run whose encoder to start from."""
    checkpoint: Which = "newest"
    """newest, best, or a step."""
    scratch: bool = False
    """Start from random weights of the run's architecture instead."""
    data: DataConfig | None = None
    """Labelled data; null: the run's own (generated clips ask for data.target)."""
    train_clips: int = 512
    """Training clips, where they are generated."""
    test_clips: int = 256
    """Test clips, where they are generated."""
    frames: int | None = None
    """Frames of a clip; null: the run's."""
    height: int | None = None
    """Height in pixels; null: the run's."""
    width: int | None = None
    """Width in pixels; null: the run's."""
    steps: int = 100
    """Optimiser steps."""
    batch_size: int = 8
    """Clips per step."""
    warmup_steps: int = 10
    """Steps over which the rate rises from 0."""
    rate: float = 1e-3
    """Learning rate of the head after the warm-up."""
    layer_decay: float = 0.75
    """Block i of n trains at rate * layer_decay^(n - i)."""
    weight_decay: float = 0.05
    """Of AdamW, for matrices."""
    clip_gradient: float | None = 1.0
    """The norm that gradients are scaled down to; null: no limit."""
    objective_weight: float = 0.0
    """Weight of the variant's whole loss, EMA included; 0 trains on labels alone."""
    heads: int = 3
    """Of the attentive pooler."""
    seed: int = 0
    """Of the new weights, data order, crops and masks."""
    workers: int = 0
    """Loader processes; 0 reads in the main process."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    output: Path | None = None
    """JSON file of the results, checkpoints beside it; null: finetune.json in the run's folder."""
    checkpoint_every: int = 50
    """Steps from one checkpoint to the next."""
    resume: bool = True
    """Go on from the newest checkpoint of this configuration, weights and data."""

    def __post_init__(self) -> None:
        for name in (
            "train_clips",
            "test_clips",
            "steps",
            "batch_size",
            "heads",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"config: {name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ConfigError(f"config: layer_decay must lie in (0, 1], got {self.layer_decay}.")
        if self.objective_weight < 0.0:
            raise ConfigError(
                f"config: objective_weight must not be negative, got {self.objective_weight}."
            )


def layer_groups(
    bundle: ModelBundle, head: nn.Module, cfg: FinetuneConfig, with_objective: bool
) -> list[dict[str, Any]]:
    """Optimiser groups by depth: `rate_scale` is layer_decay^(distance from the head). Vectors and
    biases do not decay."""
    encoder = bundle.context_encoder
    depth = len(encoder.blocks)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}

    def add(name: str, parameter: nn.Parameter, distance: int) -> None:
        key = (cfg.layer_decay**distance, parameter.ndim > 1 and not name.endswith("bias"))
        groups.setdefault(key, []).append(parameter)

    for name, parameter in encoder.named_parameters():
        first = name.split(".")
        layer = (
            int(first[1]) + 1 if first[0] == "blocks" else depth if first[0] == "norms_block" else 0
        )
        add(name, parameter, depth + 1 - layer)
    others = [head, *((bundle.predictor, bundle.heads) if with_objective else ())]
    for module in others:
        for name, parameter in module.named_parameters():
            add(name, parameter, 0)
    return [
        {"params": values, "rate_scale": scale, "weight_decay": cfg.weight_decay if decays else 0.0}
        for (scale, decays), values in groups.items()
    ]


def learning_rate(cfg: FinetuneConfig, step: int) -> float:
    """Linear warm-up, then a cosine to 0; step counts from 1."""
    if step <= cfg.warmup_steps:
        return cfg.rate * step / cfg.warmup_steps
    return cosine(cfg.rate, 0.0, (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps))


def tokens_of(encoder: nn.Module, clips: Tensor, cfg: StepConfig) -> Tensor:
    """What the head reads: last-level features of every token, float32 [B, N, E]."""
    with precision(clips.device, cfg):
        tokens: Tensor = encoder(clips, levels="last")
    return tokens.float()


def logits_of(bundle: ModelBundle, head: Probe, clips: Tensor, cfg: StepConfig) -> Tensor:
    """[B, classes] of clips [B, 3, frames, H, W]."""
    logits: Tensor = head(tokens_of(bundle.context_encoder, clips, cfg))["class"]
    return logits


def update(
    optimizer: torch.optim.Optimizer, loss: Tensor, limit: float | None, mark: Mark = unmarked
) -> None:
    """Backward, clipping to `limit` and an optimiser step; marks "backward" and "optimiser"."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    mark("backward")
    if limit is not None:
        clip_gradients(optimizer, limit)
    optimizer.step()
    mark("optimiser")


def run(cfg: FinetuneConfig) -> dict[str, Any]:
    """Fine-tunes and evaluates on the test split; writes and returns the results.

    Raises:
        ConfigError, MissingDataError: before anything is trained; also where another process is at
            work on the same results.
    """
    path = cfg.run / "finetune.json" if cfg.output is None else cfg.output
    with exclusive(path.with_suffix("")):
        return _run(cfg, path)


def _run(cfg: FinetuneConfig, path: Path) -> dict[str, Any]:
    world = distributed.start(cfg.device)
    if world.size > 1:
        raise ConfigError(f"config: fine-tuning must run in one process, got {world.size}.")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(cfg.seed)
    bundle, trained_with, digest = load_bundle(cfg.run, cfg.checkpoint)
    if cfg.scratch:
        bundle = ModelBundle(trained_with.model, trained_with.variant)
    else:
        bundle.context_encoder.load_state_dict(bundle.evaluation_encoder.state_dict())
    data = trained_with.data if cfg.data is None else cfg.data
    if data.kind in GENERATED:
        data = replace(data, size=cfg.train_clips, test_size=cfg.test_clips)
    train = labelled(build_dataset(data, "train"))
    test = labelled(build_dataset(data, "test"), train.num_classes)
    height, width = trained_with.final_size
    schedule = replace(trained_with.schedule, total_steps=cfg.steps)
    step_cfg = replace(
        trained_with,
        data=data,
        batch_size=cfg.batch_size,
        accumulate=1,
        seed=cfg.seed,
        workers=cfg.workers,
        schedule=schedule,
        resize=(),
        frames=trained_with.frames if cfg.frames is None else cfg.frames,
        height=height if cfg.height is None else cfg.height,
        width=width if cfg.width is None else cfg.width,
    )
    bundle = bundle.to(world.device)
    head = Probe("attentive", trained_with.model.width, cfg.heads, {"class": train.num_classes}).to(
        world.device
    )
    tuned = nn.ModuleDict({"bundle": bundle, "head": head})
    identity = _identity(cfg, digest, content(train, labels=True))
    checkpoints = _checkpoints(cfg, path, identity)
    losses, began = (
        _train(cfg, step_cfg, tuned, train, world, checkpoints, identity),
        time.perf_counter(),
    )
    spec = InputSpec.of(step_cfg, data.kind)
    right, tested = _right(bundle, head, step_cfg, spec, test, world.device)
    share, (low, high) = right / tested, wilson(right, tested)
    report = {
        "run": str(cfg.run),
        "weights": "scratch" if cfg.scratch else digest,
        "data": data.kind,
        "objective_weight": cfg.objective_weight,
        "steps": cfg.steps,
        "train_clips": len(train),
        "test_clips": tested,
        "test_clips_unreadable": len(test) - tested,
        "classes": train.num_classes,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "top1": share,
        "interval": (low, high),
        "test_s": time.perf_counter() - began,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    _log.info(
        "top-1 %.1f %% [%.1f, %.1f] of %d test clips; wrote %s",
        100 * share,
        100 * low,
        100 * high,
        tested,
        path,
    )
    return report


def _identity(cfg: FinetuneConfig, digest: str, data: str) -> dict[str, Any]:
    """What makes a fine-tuning the one that a checkpoint is of: settings, the weights it starts
    from, and the clips and labels it trains on."""
    settings = {
        key: value
        for key, value in to_json(cfg).items()
        if key not in ("device", "threads", "workers", "output", "resume")
    }
    return {**settings, "weights": digest, "the training clips and labels": data}


def _checkpoints(cfg: FinetuneConfig, output: Path, identity: dict[str, Any]) -> Checkpoints:
    """Where this fine-tuning keeps its checkpoints, with none in it but its own."""
    checkpoints = Checkpoints(output.with_suffix("") / "checkpoints", keep_last=1)
    steps = checkpoints.steps()
    if steps:
        others = changed_keys(read_state(checkpoints.path(steps[-1])).get("identity"), identity)
        reason = f"it was of another value of {', '.join(others)}" if others else "resume is off"
        if others or not cfg.resume:
            _log.warning(
                "starting over, not from step %d of %s: %s", steps[-1], checkpoints.folder, reason
            )
            shutil.rmtree(checkpoints.folder)
    checkpoints.tidy()
    return checkpoints


def _train(
    cfg: FinetuneConfig,
    step_cfg: PretrainConfig,
    tuned: nn.ModuleDict,
    train: ClipDataset,
    world: distributed.World,
    checkpoints: Checkpoints,
    identity: dict[str, Any],
) -> list[float]:
    """Cross-entropy (and objective) training; mean losses of ten stretches, each read once."""
    bundle, head = cast(ModelBundle, tuned["bundle"]), cast(Probe, tuned["head"])
    keeps = cfg.objective_weight > 0.0
    optimizer = torch.optim.AdamW(layer_groups(bundle, head, cfg, keeps), lr=cfg.rate)
    start, means, pending = _restored(tuned, optimizer, checkpoints)
    loader_cfg = step_cfg.loader(world)
    loader = Loader(
        Epochs(train), loader_cfg if keeps else replace(loader_cfg, masks=None), start, cfg.steps
    )
    for number, fetched in enumerate(loader, start=start + 1):
        loaded = fetched.batch.to(world.device, non_blocking=True)
        clips = model_input(loaded, step_cfg.views_at(number - 1))
        loss = functional.cross_entropy(logits_of(bundle, head, clips, step_cfg), loaded.labels)
        pending.append(loss.detach())
        if keeps:
            batch = loaded.for_step(clips, number - 1)
            loss = loss + cfg.objective_weight * loss_step(bundle, batch, step_cfg)[0]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, number) * group["rate_scale"]
        update(optimizer, loss, cfg.clip_gradient)
        if keeps and step_cfg.variant.target.kind == "ema":
            update_ema(
                bundle.averaged_encoder,
                bundle.context_encoder,
                step_cfg.schedule.ema_momentum(number),
            )
        if len(pending) == max(1, cfg.steps // 10) or number == cfg.steps:
            means.append(float(torch.stack(pending).mean()))
            _log.info("step %d/%d  label loss %.4f", number, cfg.steps, means[-1])
            pending = []
        if number % cfg.checkpoint_every == 0 or number == cfg.steps:
            weights, moments = training_tensors(tuned, optimizer)
            losses = {"means": means, "pending": [float(value) for value in pending]}
            checkpoints.save(number, weights, moments, {"identity": identity, "losses": losses})
    return means


def _restored(
    tuned: nn.ModuleDict, optimizer: torch.optim.Optimizer, checkpoints: Checkpoints
) -> tuple[int, list[float], list[Tensor]]:
    """Goes on from the newest checkpoint: steps done, mean losses, and the losses since the last
    mean."""
    if not checkpoints.steps():
        return 0, [], []
    weights, moments, saved = checkpoints.load()
    load_training_tensors(tuned, optimizer, weights, moments)
    warn_of_differences(saved["environment"])
    _log.info("resumed from step %d of %s", saved["step"], checkpoints.folder)
    device = next(tuned.parameters()).device
    # A float32 survives JSON: it is written as the double that it equals.
    return (
        saved["step"],
        list(saved["losses"]["means"]),
        [torch.tensor(value, device=device) for value in saved["losses"]["pending"]],
    )


@torch.inference_mode()
def _right(
    bundle: ModelBundle,
    head: Probe,
    step_cfg: PretrainConfig,
    spec: InputSpec,
    test: ClipDataset,
    device: torch.device,
) -> tuple[int, int]:
    """Right answers, and how many test clips could be read; the loader names the others."""
    bundle.eval()
    head.eval()
    right = torch.zeros((), device=device)
    tested = 0
    for clips, labels, _ in spec.batches(test, step_cfg.batch_size, step_cfg.workers, device):
        right += (logits_of(bundle, head, clips, step_cfg).argmax(-1) == labels).sum()
        tested += len(labels)
    if not tested:
        raise ConfigError(
            f"config: data must have test clips that can be read, got none of {len(test)}."
        )
    if tested < len(test):
        _log.warning("left out %d test clips that could not be read", len(test) - tested)
    return int(right), tested
