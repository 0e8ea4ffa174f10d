"""One cell of the sample-efficiency study: pre-train, then ask the frozen encoder at every
checkpoint; and what cells are read beside: untrained encoders, pixels, and training on labels."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from benchmarks import flop
from benchmarks.machine import busy, provenance
from jepa import pretrain, probe, recipes
from jepa.config import from_dict, merged
from jepa.data.build import build_dataset
from jepa.evaluation import InputSpec, accuracy, load_bundle, untrained_encoder
from jepa.masks.sample import sample_masks
from jepa.models.encoder import Encoder
from jepa.pretrain import PretrainConfig
from jepa.step import ModelBundle

# As in jepa/variants.py; the last is the published code's FWM-HW-LD, whose dynamics never train.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "baseline": {},
    "ld": {},
    "fwm": {},
    "fwm_ld": {},
    "hw": {},
    "fwm_hw_ld": {},
    "fwm_hw_ld_defect": {
        "base": "fwm_hw_ld",
        "published_behaviour": ["dynamics_hard_no_gradient", "dynamics_hard_pooled"],
    },
}
# Where a run is asked, in shares of its steps.
CHECKPOINTS = (0.25, 0.5, 1.0)
LABEL_SHARES = (0.01, 0.1)
_EVALUATION_BATCH = 64
_TYPICAL_STEPS = 8  # whose masks stand for all in the count of FLOP


@dataclass(frozen=True)
class Cell:
    """`clips`: unique clips to train on, 0 for one that is new in every place of every batch."""

    variant: str
    masks: str
    side: int
    clips: int
    steps: int
    seed: int

    @property
    def name(self) -> str:
        clips = self.clips or "unlimited"
        return (
            f"{self.variant}-{self.masks}-{self.side}px-{clips}clips-{self.steps}steps-{self.seed}"
        )


@dataclass(frozen=True)
class Asked:
    """How many labelled clips a probe learns from and is asked."""

    labels: int = 1536
    tests: int = 1536


def configuration(cell: Cell, output: Path) -> PretrainConfig:
    """The small recipe with the cell's variant, masks, size and length. Cells of one seed start
    from the same weights and see the same clips and masks."""
    schedule = recipes.recipe("small")["schedule"]
    batch = recipes.recipe("small")["batch_size"]
    changes = {
        "variant": {
            "base": cell.variant,
            **VARIANTS[cell.variant],
            "masks": {"name": cell.masks},
        },
        "schedule": {
            **schedule,
            "total_steps": cell.steps,
            "warmup_steps": max(1, cell.steps // 20),
        },
        "data": {"size": cell.clips or batch * cell.steps},
        "height": cell.side,
        "width": cell.side,
        "seed": cell.seed,
        "output": str(output),
        "device": "cpu",
        "threads": 1,
        "log_every": max(1, cell.steps // 20),
        "checkpoint_every": max(1, cell.steps // 4),
        "keep_last": 5,
    }
    return from_dict(PretrainConfig, merged(recipes.recipe("small"), changes))


def run_cell(cell: Cell, asked: Asked, folder: Path) -> dict[str, Any]:
    """Trains, asks and cleans up; the record of a cell. A cell that was cut off goes on from its
    newest checkpoint (its seconds are then those of the last part)."""
    torch.set_num_threads(1)
    cfg = configuration(cell, folder / cell.name)
    shared = busy()
    began, began_cpu = time.perf_counter(), time.process_time()
    pretrain.run(cfg)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    lines = [
        json.loads(line)
        for line in (cfg.output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    bundle, _, _ = load_bundle(cfg.output)
    per_step = step_flop(cfg, bundle)
    points = []
    for share in CHECKPOINTS:
        step = cell.steps if share == 1.0 else round(4 * share) * cfg.checkpoint_every
        bundle, _, _ = load_bundle(cfg.output, step)
        shares = LABEL_SHARES if step == cell.steps else ()
        point = ask(bundle.evaluation_encoder, cfg, asked, shares)
        points.append(
            {
                "step": step,
                "clips_seen": step * cfg.batch_size,
                "flop": step * per_step,
                "cpu_s": cpu * step / cell.steps,
                **point,
            }
        )
    record = {
        "kind": "cell",
        **asdict(cell),
        **asdict(asked),
        "batch_size": cfg.batch_size,
        "seconds": seconds,
        "cpu_s": cpu,
        "busy": shared or busy(),
        "flop_per_step": per_step,
        "curves": {
            name: [line.get(name) for line in lines]
            for name in (
                "step",
                "loss",
                "prediction",
                "mean_prediction",
                "effective_rank",
                "teacher_student_cosine",
            )
        },
        "points": points,
        "environment": provenance(),
    }
    shutil.rmtree(cfg.output)
    return record


def run_untrained(side: int, seed: int, asked: Asked) -> dict[str, Any]:
    """An encoder as it starts: with the seed of a cell, that cell's own start."""
    torch.set_num_threads(1)
    cfg = configuration(Cell("baseline", "blocks", side, 0, 1, seed), Path("unused"))
    point = ask(untrained_encoder(cfg, seed), cfg, asked, LABEL_SHARES)
    return {
        "kind": "untrained",
        "side": side,
        "seed": seed,
        **asdict(asked),
        "points": [{"step": 0, **point}],
        "environment": provenance(),
    }


def run_pixels(side: int, asked: Asked) -> dict[str, Any]:
    """The same linear probe on every frame scaled to 8 x 8 pixels: nothing learned."""
    torch.set_num_threads(1)
    cfg = configuration(Cell("baseline", "blocks", side, 0, 1, 0), Path("unused"))
    sets = _labelled(cfg, asked)
    spec = InputSpec.of(cfg, cfg.data.kind)
    features = {
        split: probe.Features(probe.pixel_features(data, spec), probe.questions(data)[1])
        for split, data in sets.items()
    }
    point = _answered(features, probe.questions(sets["train"])[0], ())
    return {
        "kind": "pixels",
        "side": side,
        **asdict(asked),
        "points": [point],
        "environment": provenance(),
    }


def run_supervised(side: int, asked: Asked, cpu_seconds: float = 300.0) -> dict[str, Any]:
    """The encoder trained on labels, as many new clips as fit the time: what this size can learn of
    this data."""
    torch.set_num_threads(1)
    cfg = configuration(Cell("baseline", "blocks", side, 0, 1, 0), Path("unused"))
    found = supervised(cfg, tests=asked.tests, cpu_seconds=cpu_seconds)
    return {"kind": "supervised", "side": side, **found, "environment": provenance()}


def supervised(
    cfg: PretrainConfig, *, tests: int, cpu_seconds: float, steps: int = 2000, rate: float = 2e-3
) -> dict[str, Any]:
    """Test accuracy of every question after training encoder and linear heads on new labelled
    clips: AdamW, warm-up and a cosine to 0 over `steps`, or fewer where the seconds of processor
    time do not suffice for them (measured on the first steps)."""
    train = build_dataset(replace(cfg.data, size=cfg.batch_size * steps))
    test = build_dataset(replace(cfg.data, test_size=tests), "test")
    spec = InputSpec.of(cfg, cfg.data.kind)
    classes, _ = probe.questions(test)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        encoder = Encoder(cfg.model)
        heads = nn.ModuleDict(
            {name: nn.Linear(cfg.model.feature_width, count) for name, count in classes.items()}
        )
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.04)
    began, trial = time.process_time(), 20
    step = 0
    batches = spec.batches(train, cfg.batch_size, 0, torch.device("cpu"))
    while step < steps:
        clips, _, places = next(batches)
        labels = train.factors(places)  # type: ignore[attr-defined]
        if step == trial:
            per_step = (time.process_time() - began) / trial
            steps = max(trial + 1, min(steps, int(0.97 * cpu_seconds / per_step)))
        progress = step / steps
        factor = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        pooled = encoder(clips).mean(1)
        loss = torch.stack(
            [
                functional.cross_entropy(head(pooled), torch.from_numpy(labels[name]))
                for name, head in heads.items()
            ]
        ).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
    cpu = time.process_time() - began
    features, truth = mean_features(encoder, test, spec), probe.questions(test)[1]
    with torch.inference_mode():
        pooled = torch.from_numpy(features[:, 0])
        top1 = {name: accuracy(head(pooled), truth[name]) for name, head in heads.items()}
    return {"top1": top1, "steps": step, "cpu_s": cpu, "tests": tests}


@torch.inference_mode()
def mean_features(encoder: Encoder, dataset: Any, spec: InputSpec) -> NDArray[np.float32]:
    """[clips, 1, D], the mean token of all levels of every clip."""
    encoder = encoder.eval()
    batches = spec.batches(dataset, _EVALUATION_BATCH, 0, torch.device("cpu"))
    return np.concatenate(
        [encoder(clips).mean(1, keepdim=True).float().numpy() for clips, _, _ in batches]
    )


def _labelled(cfg: PretrainConfig, asked: Asked) -> dict[str, Any]:
    """Clips for the probe, of another seed than any that a cell trains on."""
    data = replace(cfg.data, size=asked.labels, test_size=asked.tests, seed=10_000)
    return {split: build_dataset(data, split) for split in ("train", "test")}  # type: ignore[arg-type]


def ask(
    encoder: Encoder, cfg: PretrainConfig, asked: Asked, shares: Sequence[float]
) -> dict[str, Any]:
    """What the frozen encoder's features answer."""
    sets = _labelled(cfg, asked)
    spec = InputSpec.of(cfg, cfg.data.kind)
    features = {
        split: probe.Features(mean_features(encoder, data, spec), probe.questions(data)[1])
        for split, data in sets.items()
    }
    return _answered(features, probe.questions(sets["train"])[0], shares)


def _answered(
    features: Mapping[str, probe.Features], classes: Mapping[str, int], shares: Sequence[float]
) -> dict[str, Any]:
    cfg = probe.ProbeConfig(device="cpu")
    train, test = features["train"], features["test"]
    every = np.arange(len(test.tokens))
    trained = probe.fitted(cfg, "linear", train, classes, 0)
    hits = probe.right_answers(trained.probe, test, every)
    neighbours = probe.probed(cfg, "knn", train, test, classes)["questions"]
    fewer = {}
    for share in shares:
        rows = np.arange(max(1, round(share * len(train.tokens))))
        part = probe.Features(
            train.tokens[rows], {name: values[rows] for name, values in train.labels.items()}
        )
        fitted = probe.fitted(cfg, "linear", part, classes, 0)
        fewer[str(share)] = probe.answers(fitted.probe, test, every)
    return {
        "linear": {name: float(values.mean()) for name, values in hits.items()},
        "linear_train": probe.answers(trained.probe, train, np.arange(len(train.tokens))),
        "linear_converged": trained.converged,
        "penalty": trained.decay,
        "knn": {name: value["top1"] for name, value in neighbours.items()},
        "fewer_labels": fewer,
        # Clip by clip, so that intervals can be paired over clips: bit i of the bytes is clip i.
        "hits": {name: np.packbits(values).tobytes().hex() for name, values in hits.items()},
    }


def step_flop(cfg: PretrainConfig, bundle: ModelBundle) -> float:
    """FLOP of a training step: encoder and predictor by formula with the masks of some steps, and
    the linear layers of the objectives' heads once per temporal pair, forward and backward."""
    grid = (
        cfg.frames // cfg.model.tubelet_size,
        cfg.height // cfg.model.patch_size,
        cfg.width // cfg.model.patch_size,
    )
    tokens = math.prod(grid)
    head = sum(
        6.0 * layer.in_features * layer.out_features
        for layer in bundle.heads.modules()
        if isinstance(layer, nn.Linear)
    )
    policy, total = cfg.variant.mask_policy, 0.0
    for step in range(_TYPICAL_STEPS):
        slots, horizon = np.arange(cfg.batch_size), cfg.variant.pair_horizon
        # Guided masks hide as many tokens as others, so still clips serve to count them.
        maps = np.zeros((cfg.batch_size, *grid)) if policy.motion is not None else None
        masks = sample_masks(
            policy, grid, seed=cfg.seed, step=step, samples=slots, motion_maps=maps, horizon=horizon
        )
        seen, hidden = (cu.diff().tolist() for cu in (masks.context_cu, masks.target_cu))
        parts = flop.pretrain_step(
            cfg.model,
            tokens,
            cfg.batch_size,
            seen,
            hidden,
            online_target=cfg.variant.target.kind == "online",
        )
        total += sum(part.total for part in parts.values()) + head * len(masks.pairs)
    return total / _TYPICAL_STEPS
