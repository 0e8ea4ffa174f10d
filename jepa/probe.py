"""Probes of a frozen encoder: attentive (one learned query per question, one cross-attention block,
a linear layer) or linear.

Features are computed once and kept on disk; only the probe trains. On moving_shapes every factor is
a question of its own, answered side by side from the same features; any other data set asks for its
class.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from jepa import distributed
from jepa.atomic import write_json
from jepa.config import ConfigError
from jepa.data.build import DataConfig, build_dataset
from jepa.data.clip import ClipDataset, ClipSpec
from jepa.data.moving_shapes import APPEARANCE, FACTORS, MovingShapes
from jepa.evaluation import (
    InputSpec,
    Which,
    accuracy,
    cache_key,
    cached_features,
    load_bundle,
    untrained_encoder,
    wilson,
)
from jepa.models.blocks import Mlp, initialise
from jepa.models.encoder import Levels
from jepa_kernels.nn import CrossAttention

_log = logging.getLogger(__name__)
_PIXEL_SIDE = 8


@dataclass(frozen=True)
class ProbeConfig:
    """What to probe and how. The defaults probe the embedded run on moving_shapes in about a
    minute.

    Args:
        run: folder of a pre-training run. checkpoint: ``newest``, ``best`` or a step.
        data: labelled data; None means the run's own. frames, height, width: of the input, None for
            the run's.
        train_clips, test_clips: at most so many are used of moving_shapes.
        kind: ``attentive`` or ``linear`` (on the mean token). levels: ``last`` (published) or
            ``all``.
        seeds: of the probe's weights and data order, one probe each. epochs, batch_size, heads: of
            its training.
        learning_rates, weight_decays: every pair is tried; with several the best on a tenth of the
            training clips is taken.
        untrained, pixels: also probe an untrained encoder and the bare pixels.
        output: JSON file of the results, None for `probe.json` in the run's folder.
    """

    run: Path = Path("runs/pretrain")
    checkpoint: Which = "newest"
    data: DataConfig | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    train_clips: int = 512
    test_clips: int = 256
    kind: Literal["attentive", "linear"] = "attentive"
    levels: Levels = "last"
    seeds: tuple[int, ...] = (0, 1)
    epochs: int = 10
    batch_size: int = 32
    heads: int = 3
    learning_rates: tuple[float, ...] = (2e-3,)
    weight_decays: tuple[float, ...] = (0.01,)
    untrained: bool = True
    pixels: bool = True
    workers: int = 0
    device: str = "auto"
    threads: int | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        for name in ("train_clips", "test_clips", "epochs", "batch_size", "heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config: {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("seeds", "learning_rates", "weight_decays"):
            if not getattr(self, name):
                raise ConfigError(f"config: {name} must not be empty, got ().")


class AttentivePooler(nn.Module):
    """The published pooler with a query per question: q + cross-attention(q, norm(x)), then q +
    mlp(norm(q)). [B, N, D] -> [B, Q, D]."""

    def __init__(self, width: int, heads: int, questions: int = 1) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, questions, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.xattn = CrossAttention(width, heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width)
        self.apply(initialise)
        nn.init.trunc_normal_(self.query_tokens, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query_tokens.expand(len(tokens), -1, -1)
        query = query + self.xattn(query, self.norm1(tokens))
        return query + self.mlp(self.norm2(query))


class Probe(nn.Module):
    """Logits of every question from the tokens of a clip: [B, N, D] -> one [B, classes] each."""

    def __init__(self, kind: str, width: int, heads: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        if kind == "attentive" and width % heads:
            raise ConfigError(f"config: heads must divide the feature width {width}, got {heads}.")
        self.pooler = AttentivePooler(width, heads, len(classes)) if kind == "attentive" else None
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.linears = nn.ModuleDict(
            {name: nn.Linear(width, count) for name, count in classes.items()}
        )
        self.linears.apply(initialise)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        if self.pooler is None:
            pooled = self.norm(tokens.mean(1))
            return {name: linear(pooled) for name, linear in self.linears.items()}
        return {
            name: linear(pooled)
            for (name, linear), pooled in zip(self.linears.items(), self.pooler(tokens).unbind(1))
        }


@dataclass(frozen=True)
class Features:
    """Tokens [clips, N, D] and the answers to every question."""

    tokens: NDArray[np.floating]
    labels: Mapping[str, Tensor]

    def at(self, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        # Sorted rows: a mapped file is read in one direction.
        rows = np.sort(rows)
        tokens = torch.from_numpy(np.ascontiguousarray(self.tokens[rows])).to(device).float()
        return tokens, {
            name: values[torch.from_numpy(rows)].to(device) for name, values in self.labels.items()
        }


def train_probe(
    cfg: ProbeConfig,
    kind: str,
    train: Features,
    rows: NDArray[np.int64],
    classes: Mapping[str, int],
    seed: int,
    rate: float,
    decay: float,
) -> Probe:
    """A probe trained on `rows` of the features: AdamW, a cosine to 0, cross-entropy summed over
    the questions."""
    device = torch.device(
        "cuda"
        if cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
        else "cpu"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(kind, train.tokens.shape[2], cfg.heads, classes).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=decay)
    size = min(cfg.batch_size, len(rows))
    steps = max(1, len(rows) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs * steps)
    order = np.random.default_rng(seed)
    for _ in range(cfg.epochs):
        shuffled = order.permutation(rows)
        for step in range(steps):
            tokens, labels = train.at(shuffled[step * size : (step + 1) * size], device)
            loss = sum(
                functional.cross_entropy(logits, labels[name])
                for name, logits in probe(tokens).items()
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval()


@torch.inference_mode()
def answers(
    probe: Probe, features: Features, rows: NDArray[np.int64], batch_size: int = 128
) -> dict[str, float]:
    """The share of right answers to every question."""
    device = next(probe.parameters()).device
    right = dict.fromkeys(features.labels, 0.0)
    for start in range(0, len(rows), batch_size):
        tokens, labels = features.at(rows[start : start + batch_size], device)
        for name, logits in probe(tokens).items():
            right[name] += accuracy(logits, labels[name]) * len(tokens)
    return {name: value / len(rows) for name, value in right.items()}


def probed(
    cfg: ProbeConfig, kind: str, train: Features, test: Features, classes: Mapping[str, int]
) -> dict[str, Any]:
    """Test accuracy of every question: each seed's, their mean, its 95 % interval over test clips
    (Wilson), and what chance reaches."""
    everything, count = np.arange(len(train.tokens)), len(test.tokens)
    pairs = [(rate, decay) for rate in cfg.learning_rates for decay in cfg.weight_decays]
    found: dict[str, list[float]] = {name: [] for name in classes}
    for seed in cfg.seeds:
        rate, decay = (
            pairs[0] if len(pairs) == 1 else _chosen(cfg, kind, train, classes, seed, pairs)
        )
        probe = train_probe(cfg, kind, train, everything, classes, seed, rate, decay)
        for name, value in answers(probe, test, np.arange(count)).items():
            found[name].append(value)
    result = {}
    for name, values in found.items():
        mean = sum(values) / len(values)
        # What one constant answer reaches at best: with few classes present, 1 / classes would
        # flatter every encoder.
        chance = float(torch.bincount(test.labels[name]).max()) / count
        result[name] = {
            "top1": mean,
            "interval": wilson(mean * count, count),
            "seeds": values,
            "chance": chance,
        }
    return result


def _chosen(
    cfg: ProbeConfig,
    kind: str,
    train: Features,
    classes: Mapping[str, int],
    seed: int,
    pairs: list[tuple[float, float]],
) -> tuple[float, float]:
    """The pair that does best on a tenth of the training clips: test clips have no say."""
    rows = np.random.default_rng(seed).permutation(len(train.tokens))
    held = max(1, len(rows) // 10)
    scores = []
    for pair in pairs:
        probe = train_probe(cfg, kind, train, rows[held:], classes, seed, *pair)
        scores.append(sum(answers(probe, train, rows[:held]).values()))
    return pairs[int(np.argmax(scores))]


def questions(dataset: ClipDataset) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Number of classes and the labels of every question that a data set can ask."""
    if isinstance(dataset, MovingShapes):
        labels = {
            name: torch.from_numpy(values)
            for name, values in dataset.factors(np.arange(len(dataset))).items()
        }
        return {name: len(values) for name, values in FACTORS.items()}, labels
    labels = torch.tensor([dataset.label(i) for i in range(len(dataset))])
    if int(labels.min()) < 0:
        raise ConfigError(
            f"config: data must have a label for every clip of {dataset.name}, got one without."
        )
    return {"class": dataset.num_classes}, {"class": labels}


def pixel_features(dataset: ClipDataset, spec: InputSpec) -> NDArray[np.float16]:
    """[clips, 1, frames * 8 * 8 * 3]: every frame scaled down to 8 x 8 pixels, nothing learned."""
    small = ClipSpec(spec.frames, spec.stride, spec.fps, spec.height, spec.width)
    rows = []
    for index in range(len(dataset)):
        frames = (
            torch.from_numpy(dataset.read(index, small, 0.5).frames).permute(0, 3, 1, 2).float()
            / 255
        )
        rows.append(
            functional.adaptive_avg_pool2d(frames, _PIXEL_SIDE).flatten().to(torch.float16).numpy()
        )
    return np.stack(rows)[:, None]


def run(cfg: ProbeConfig) -> dict[str, Any]:
    """Probes a run and what it is to be compared with; prints a table and writes the results as
    JSON."""
    world = distributed.start(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    bundle, trained_with, digest = load_bundle(cfg.run, cfg.checkpoint)
    data = trained_with.data if cfg.data is None else cfg.data
    if data.kind == "moving_shapes":
        data = replace(data, size=cfg.train_clips, test_size=cfg.test_clips)
    sets = {split: build_dataset(data, split) for split in ("train", "test")}
    spec = InputSpec.of(trained_with, data.kind, cfg.frames, cfg.height, cfg.width)
    classes, _ = questions(sets["train"])
    labels = {split: questions(dataset)[1] for split, dataset in sets.items()}
    encoders = {"trained": (bundle.evaluation_encoder, digest)}
    if cfg.untrained:
        encoders["untrained"] = (untrained_encoder(trained_with), "untrained 0")
    results: dict[str, Any] = {}
    for name, (encoder, identity) in encoders.items():
        parts = {}
        for split, dataset in sets.items():
            key = cache_key(
                identity,
                asdict(trained_with.model),
                asdict(data),
                split,
                len(dataset),
                asdict(spec),
                cfg.levels,
            )
            path = cfg.run / "features" / f"{key}.npy"
            tokens = cached_features(
                encoder,
                dataset,
                spec,
                path,
                levels=cfg.levels,
                workers=cfg.workers,
                device=world.device,
            )
            parts[split] = Features(tokens, labels[split])
        results[name] = probed(cfg, cfg.kind, parts["train"], parts["test"], classes)
    if cfg.pixels:
        parts = {
            split: Features(pixel_features(dataset, spec), labels[split])
            for split, dataset in sets.items()
        }
        results["pixels"] = probed(cfg, "linear", parts["train"], parts["test"], classes)
    report = {
        "run": str(cfg.run),
        "weights": digest,
        "kind": cfg.kind,
        "data": data.kind,
        "input": asdict(spec),
        "train_clips": len(sets["train"]),
        "test_clips": len(sets["test"]),
        "epochs": cfg.epochs,
        "results": results,
    }
    path = cfg.run / "probe.json" if cfg.output is None else cfg.output
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    show(report)
    _log.info("wrote %s", path)
    return report


def show(report: Mapping[str, Any]) -> None:
    """The results as a table: a row per question, appearance before motion."""
    results = report["results"]
    # Narrow enough for 80 columns: the group is a row of its own.
    table = Table(
        title=f"{report['kind']} probe, top-1 in % [95 % interval], {report['test_clips']} test "
        "clips",
        box=SIMPLE,
    )
    for column in ("question", "chance", *results):
        table.add_column(column, no_wrap=True)
    last = ""
    for name, value in results["trained"].items():
        group = "class" if name == "class" else "appearance" if name in APPEARANCE else "motion"
        if group not in (last, "class"):
            table.add_row(f"[bold]{group}[/bold]")
        last = group
        table.add_row(
            name, f"{100 * value['chance']:.1f}", *(_cell(one[name]) for one in results.values())
        )
    Console().print(table)


def _cell(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    return f"{100 * value['top1']:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
