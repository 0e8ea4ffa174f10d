"""Fine-tuning on labelled clips: the run's encoder and an attentive pooler, rates that fall layer
by layer, the objective kept on or not."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from jepa import distributed
from jepa.allocator import keep_freed_memory
from jepa.batch import Batch
from jepa.checkpoint import (
    Checkpoints,
    load_training_tensors,
    read_state,
    training_tensors,
    warn_of_differences,
    write_json,
)
from jepa.config import ConfigError, changed_keys, to_json
from jepa.data.build import GENERATED, DataConfig, build_dataset
from jepa.data.clip import ClipDataset
from jepa.data.loader import Loader
from jepa.data.mixture import Epochs
from jepa.evaluation import InputSpec, Which, load_bundle, wilson
from jepa.models.probes import Probe
from jepa.pretrain import PretrainConfig, prepared
from jepa.schedules import cosine
from jepa.step import ModelBundle, loss_step, precision
from jepa.target import update_ema

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneConfig:
    """What to fine-tune and how.

    Args:
        run, checkpoint: whose evaluation encoder to start from; `scratch` starts from random
            weights of its architecture.
        data: labelled data; None means the run's own (generated clips ask for `data.target`).
            train_clips, test_clips: of generated clips.
        frames, height, width: of the input, None for the run's.
        steps, batch_size, warmup_steps, rate, layer_decay, weight_decay: AdamW; block i of n trains
        at rate * layer_decay^(n - i). objective_weight: 0 trains on labels alone; otherwise the
        variant's whole loss is added with this weight, EMA included. heads: of the pooler. seed: of
        the new weights, data order, crops and masks. output: JSON file of the results, None for
            `finetune.json` in the run's folder. Checkpoints lie beside it, in a folder of its name.
        checkpoint_every: in steps. resume: go on from the newest checkpoint where it is of this
            configuration and these weights; those of another one are removed, as its results are.
    """

    run: Path = Path("runs/pretrain")
    checkpoint: Which = "newest"
    scratch: bool = False
    data: DataConfig | None = None
    train_clips: int = 512
    test_clips: int = 256
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int = 100
    batch_size: int = 8
    warmup_steps: int = 10
    rate: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    clip_gradient: float | None = 1.0
    objective_weight: float = 0.0
    heads: int = 3
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    threads: int | None = None
    output: Path | None = None
    checkpoint_every: int = 50
    resume: bool = True

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


def logits_of(bundle: ModelBundle, head: Probe, clips: Tensor, cfg: PretrainConfig) -> Tensor:
    with precision(clips.device, cfg):
        tokens = bundle.context_encoder(clips, levels="last")
    return head(tokens.float())["class"]


def run(cfg: FinetuneConfig) -> dict[str, Any]:
    """Fine-tunes and evaluates on the test split; writes and returns the results."""
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
    train, test = (build_dataset(data, split) for split in ("train", "test"))
    size = dict(zip(("height", "width"), trained_with.final_size, strict=True))
    size |= {
        key: getattr(cfg, key)
        for key in ("frames", "height", "width")
        if getattr(cfg, key) is not None
    }
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
        **size,
    )
    bundle = bundle.to(world.device)
    head = Probe("attentive", trained_with.model.width, cfg.heads, {"class": train.num_classes}).to(
        world.device
    )
    path = cfg.run / "finetune.json" if cfg.output is None else cfg.output
    tuned = nn.ModuleDict({"bundle": bundle, "head": head})
    checkpoints = _checkpoints(cfg, path, digest)
    losses, began = (
        _train(cfg, step_cfg, tuned, train, world, checkpoints, digest),
        time.perf_counter(),
    )
    spec = InputSpec.of(step_cfg, data.kind)
    right = _right(bundle, head, step_cfg, spec, test, world.device)
    report = {
        "run": str(cfg.run),
        "weights": "scratch" if cfg.scratch else digest,
        "data": data.kind,
        "objective_weight": cfg.objective_weight,
        "steps": cfg.steps,
        "train_clips": len(train),
        "test_clips": len(test),
        "classes": train.num_classes,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "top1": right / len(test),
        "interval": wilson(right, len(test)),
        "test_s": time.perf_counter() - began,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    low, high = report["interval"]
    _log.info(
        "top-1 %.1f %% [%.1f, %.1f] of %d test clips; wrote %s",
        100 * report["top1"],
        100 * low,
        100 * high,
        len(test),
        path,
    )
    return report


def _identity(cfg: FinetuneConfig, digest: str) -> dict[str, Any]:
    """What makes a fine-tuning the one that a checkpoint is of."""
    settings = {
        key: value
        for key, value in to_json(cfg).items()
        if key not in ("device", "threads", "workers", "output", "resume")
    }
    return {**settings, "weights": digest}


def _checkpoints(cfg: FinetuneConfig, output: Path, digest: str) -> Checkpoints:
    """Where this fine-tuning keeps its checkpoints, with none in it but its own."""
    checkpoints = Checkpoints(output.with_suffix("") / "checkpoints", keep_last=1)
    steps = checkpoints.steps()
    if steps:
        others = changed_keys(
            read_state(checkpoints.path(steps[-1])).get("identity"), _identity(cfg, digest)
        )
        reason = f"it was of another value of {', '.join(others)}" if others else "resume is off"
        if others or not cfg.resume:
            _log.warning(
                "starting over, not from step %d of %s: %s", steps[-1], checkpoints.folder, reason
            )
            shutil.rmtree(checkpoints.folder)
    return checkpoints


def _train(
    cfg: FinetuneConfig,
    step_cfg: PretrainConfig,
    tuned: nn.ModuleDict,
    train: ClipDataset,
    world: distributed.World,
    checkpoints: Checkpoints,
    digest: str,
) -> list[float]:
    """Cross-entropy (and objective) training; mean losses of ten stretches, each read once."""
    bundle, head = tuned["bundle"], tuned["head"]
    keeps = cfg.objective_weight > 0.0
    optimizer = torch.optim.AdamW(layer_groups(bundle, head, cfg, keeps), lr=cfg.rate)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    start, means, pending = _restored(tuned, optimizer, checkpoints)
    loader_cfg = step_cfg.loader(world)
    loader = Loader(
        Epochs(train), loader_cfg if keeps else replace(loader_cfg, masks=None), start, cfg.steps
    )
    for number, fetched in enumerate(loader, start=start + 1):
        batch: Batch = prepared(fetched.batch, step_cfg, world.device, number - 1)
        loss = functional.cross_entropy(
            logits_of(bundle, head, batch.clips, step_cfg), batch.labels
        )
        pending.append(loss.detach())
        if keeps:
            loss = loss + cfg.objective_weight * loss_step(bundle, batch, step_cfg)[0]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, number) * group["rate_scale"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if cfg.clip_gradient is not None:
            nn.utils.clip_grad_norm_(parameters, cfg.clip_gradient)
        optimizer.step()
        if keeps and step_cfg.variant.target.kind == "ema":
            update_ema(
                bundle.target_encoder,
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
            checkpoints.save(
                number, weights, moments, {"identity": _identity(cfg, digest), "losses": losses}
            )
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
) -> int:
    bundle.eval()
    head.eval()
    right = torch.zeros((), device=device)
    for batch in spec.batches(test, step_cfg.batch_size, step_cfg.workers, device):
        right += (logits_of(bundle, head, batch.clips, step_cfg).argmax(-1) == batch.labels).sum()
    return int(right)
