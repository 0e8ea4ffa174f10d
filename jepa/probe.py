"""Probes of a frozen encoder, side by side: linear and k-nearest-neighbour on the mean token, and
attentive (one learned query per question, one cross-attention block, a linear layer).

A linear probe and neighbours say what the features hold; an attentive probe has enough weights of
its own to answer much from an untrained encoder too, so it is read beside that. Mean tokens lie
close to a few directions (of an untrained encoder, to one), along which stochastic steps are spent
while the rest is never reached: the linear probe whitens them, which does not change what it can
express, and is solved rather than trained. Features are computed once and kept on disk; only the
probe trains, for a number of steps that does not depend on how many clips there are, and it says so
when that was too few. On generated clips every factor is a
question of its own, answered side by side from the same features; any other data set asks for its
class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from jepa.data import moving_shapes, moving_textures
from jepa.data.build import GENERATED, DataConfig, build_dataset
from jepa.data.clip import BadClipError, ClipDataset, ClipSpec, labelled
from jepa.data.moving_shapes import MovingShapes
from jepa.data.moving_textures import MovingTextures
from jepa.evaluation import (
    InputSpec,
    Which,
    accuracy,
    cache_key,
    cached_features,
    content,
    load_bundle,
    readable,
    untrained_encoder,
    wilson,
)
from jepa.models.encoder import Levels
from jepa.models.probes import Probe

_log = logging.getLogger(__name__)
_PIXEL_SIDE = 8
_HELD_OUT = 0.125  # of the training clips, to choose by
# A curve has so many points; a probe whose loss still falls by this share of its whole descent over
# the last fifth of its steps has not converged.
_CURVE_POINTS = 20
_STILL_FALLING = 0.05
_NEIGHBOURS = (5, 20, 80)
_NEIGHBOUR_TEMPERATURE = 0.07

Kind = Literal["linear", "attentive", "knn"]


@dataclass(frozen=True)
class ProbeConfig:
    """What to probe and how."""

    run: Path = Path("runs/pretrain")
    """Folder of a pre-training run."""
    checkpoint: Which = "newest"
    """newest, best, or a step."""
    data: DataConfig | None = None
    """Labelled data; null: the run's own."""
    frames: int | None = None
    """Frames of a clip; null: the run's."""
    height: int | None = None
    """Height in pixels; null: the run's."""
    width: int | None = None
    """Width in pixels; null: the run's."""
    train_clips: int = 2048
    """Training clips that are used, where they are generated."""
    test_clips: int = 1024
    """Test clips that are used, where they are generated."""
    kinds: tuple[Kind, ...] = ("linear", "attentive", "knn")
    """linear and knn: on the mean token; attentive: a learned query over the tokens."""
    levels: Levels = "all"
    """Features to probe: all levels side by side, or the last alone."""
    attentive_levels: Levels = "last"
    """Of the attentive probe, published with the last; all cost the square of their number."""
    seeds: tuple[int, ...] = (0,)
    """Of the probe's weights and data order: one probe each."""
    steps: int = 2000
    """Training steps of an attentive probe."""
    batch_size: int = 32
    """Clips per step."""
    heads: int = 3
    """Of the attentive pooler."""
    learning_rates: tuple[float, ...] = (2e-3,)
    """All are tried; the best on an eighth of the training clips is taken."""
    weight_decays: tuple[float, ...] = (0.01, 1.0)
    """All are tried, with every learning rate."""
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    """Weights of |W|^2 / 2 in the loss of the linear probe; chosen in the same way."""
    untrained: bool = True
    """Also probe an untrained encoder."""
    pixels: bool = True
    """Also probe the bare pixels."""
    workers: int = 0
    """Loader processes; 0 reads in the main process."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    output: Path | None = None
    """JSON file of the results; null: probe.json in the run's folder."""

    def __post_init__(self) -> None:
        for name in ("train_clips", "test_clips", "steps", "batch_size", "heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config: {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("kinds", "seeds", "learning_rates", "weight_decays", "penalties"):
            if not getattr(self, name):
                raise ConfigError(f"config: {name} must not be empty, got ().")


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

    def at_rows(self, rows: NDArray[np.int64]) -> Features:
        """Those clips alone; itself where they are all."""
        if len(rows) == len(self.tokens):
            return self
        labels = {name: values[torch.from_numpy(rows)] for name, values in self.labels.items()}
        return Features(self.tokens[rows], labels)

    def last(self, width: int) -> Features:
        """The last `width` channels: those of the last level."""
        return Features(self.tokens[..., -width:], self.labels)

    def pooled(self) -> Features:
        """The mean token of every clip: [clips, 1, D] float32."""
        tokens = self.tokens
        if tokens.shape[1] == 1 and tokens.dtype == np.float32:
            return self
        return Features(tokens.mean(1, keepdims=True, dtype=np.float32), self.labels)


@dataclass(frozen=True)
class Trained:
    """A probe and its training loss, as means over equal parts of its steps. `decay` is the weight
    decay of an attentive probe, the penalty of a linear one, which has no rate."""

    probe: Probe
    curve: tuple[float, ...]
    converged: bool
    rate: float | None
    decay: float


def has_converged(curve: Sequence[float]) -> bool:
    """Whether the last fifth of a loss curve lowered it by no more than a twentieth of its whole
    descent. Too short a curve has not; one that never fell has nothing left to learn."""
    fifth = len(curve) // 5
    if fifth < 1:
        return False
    before, last = (float(np.mean(part)) for part in (curve[-2 * fifth : -fifth], curve[-fifth:]))
    descent = max(curve[0] - last, 0.0)
    return bool(before - last <= _STILL_FALLING * descent)


def train_probe(
    cfg: ProbeConfig,
    kind: str,
    train: Features,
    rows: NDArray[np.int64],
    classes: Mapping[str, int],
    seed: int,
    rate: float,
    decay: float,
) -> Trained:
    """An attentive probe trained on `rows` of the features: AdamW, a cosine to 0, cross-entropy
    summed over the questions, batches drawn with replacement."""
    device = _device(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(kind, train.tokens.shape[2], cfg.heads, classes).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    order = np.random.default_rng(seed)
    losses = torch.zeros(cfg.steps, device=device)
    for step in range(cfg.steps):
        tokens, labels = train.at(order.choice(rows, min(cfg.batch_size, len(rows))), device)
        loss = _cross_entropy(probe(tokens), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
    parts = losses.cpu().tensor_split(min(_CURVE_POINTS, cfg.steps))
    curve = tuple(float(part.mean()) for part in parts)
    return Trained(probe.eval(), curve, has_converged(curve), rate, decay)


def solve_linear(
    cfg: ProbeConfig,
    train: Features,
    rows: NDArray[np.int64],
    classes: Mapping[str, int],
    penalty: float,
) -> Trained:
    """The linear probe of `rows`: multinomial logistic regression of every question from whitened
    mean tokens, by L-BFGS from zero weights until it stops or `steps` are made. Convex: no seed."""
    device = _device(cfg)
    tokens, labels = train.pooled().at(rows, device)
    probe = Probe("linear", tokens.shape[2], cfg.heads, classes).to(device)
    assert probe.whitening is not None
    probe.whitening.fit(tokens[:, 0])
    inputs = probe.whitening(tokens[:, 0])
    for parameter in probe.linear.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        probe.linear.parameters(),
        max_iter=cfg.steps,
        history_size=10,
        tolerance_grad=1e-4,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )
    curve: list[float] = []
    counts = list(classes.values())

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = dict(zip(classes, probe.linear(inputs).split(counts, dim=1)))
        loss = _cross_entropy(logits, labels) + 0.5 * penalty * probe.linear.weight.square().sum()
        loss.backward()
        curve.append(float(loss.detach()))
        return loss

    optimizer.step(closure)
    iterations = optimizer.state[probe.linear.weight]["n_iter"]
    return Trained(probe.eval(), tuple(curve), iterations < cfg.steps, None, penalty)


def _device(cfg: ProbeConfig) -> torch.device:
    on_gpu = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def _cross_entropy(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """Summed over the questions."""
    return torch.stack(
        [functional.cross_entropy(one, labels[name]) for name, one in logits.items()]
    ).sum()


def fitted(
    cfg: ProbeConfig, kind: str, train: Features, classes: Mapping[str, int], seed: int
) -> Trained:
    """A probe trained on all of the features, with the rate and weight decay (or penalty) that do
    best on an eighth of them where there are several."""
    tried: list[Callable[[NDArray[np.int64]], Trained]] = (
        [
            partial(solve_linear, cfg, train, classes=classes, penalty=penalty)
            for penalty in cfg.penalties
        ]
        if kind == "linear"
        else [
            partial(
                train_probe, cfg, kind, train, classes=classes, seed=seed, rate=rate, decay=decay
            )
            for rate in cfg.learning_rates
            for decay in cfg.weight_decays
        ]
    )
    best = tried[0]
    if len(tried) > 1:
        held, rest = _held_out(len(train.tokens), seed)
        scores = [sum(answers(one(rest).probe, train, held).values()) for one in tried]
        best = tried[int(np.argmax(scores))]
    return best(np.arange(len(train.tokens)))


@torch.inference_mode()
def right_answers(
    probe: Probe, features: Features, rows: NDArray[np.int64], batch_size: int = 128
) -> dict[str, NDArray[np.bool_]]:
    """Whether the answer to every question is right, clip by clip."""
    device = next(probe.parameters()).device
    if probe.pooler is None:
        features = features.pooled()
    right: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in features.labels}
    for start in range(0, len(rows), batch_size):
        tokens, labels = features.at(rows[start : start + batch_size], device)
        for name, logits in probe(tokens).items():
            right[name].append((logits.argmax(-1) == labels[name]).cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in right.items()}


def answers(probe: Probe, features: Features, rows: NDArray[np.int64]) -> dict[str, float]:
    """The share of right answers to every question."""
    return {name: float(hits.mean()) for name, hits in right_answers(probe, features, rows).items()}


def probed(
    cfg: ProbeConfig, kind: str, train: Features, test: Features, classes: Mapping[str, int]
) -> dict[str, Any]:
    """The answers to every question: `top1` on the test clips, each seed's and their mean, its 95 %
    interval over test clips (Wilson), accuracy on the training clips, and what chance reaches; with
    them, under ``training``, what was chosen and whether the probes converged."""
    count = len(test.tokens)
    found: dict[str, list[float]] = {name: [] for name in classes}
    seen: dict[str, list[float]] = {name: [] for name in classes}
    training: dict[str, Any] = {"converged": True}
    if kind == "linear":
        train, test = train.pooled(), test.pooled()
    if kind == "knn":
        training = _neighbours(train.pooled(), test.pooled(), classes, found, seen)
    else:
        everything = np.arange(len(train.tokens))
        training |= {"rate": [], "decay": [], "curves": []}
        # A linear probe is the solution of a convex problem: one seed says all.
        for seed in cfg.seeds if kind == "attentive" else cfg.seeds[:1]:
            trained = fitted(cfg, kind, train, classes, seed)
            training["rate"].append(trained.rate)
            training["decay"].append(trained.decay)
            training["curves"].append(trained.curve)
            training["converged"] &= trained.converged
            for into, features, rows in (
                (found, test, np.arange(count)),
                (seen, train, everything),
            ):
                for name, value in answers(trained.probe, features, rows).items():
                    into[name].append(value)
    result: dict[str, Any] = {}
    for name, values in found.items():
        mean = sum(values) / len(values)
        # What one constant answer reaches at best: with few classes present, 1 / classes would
        # flatter every encoder.
        chance = float(torch.bincount(test.labels[name]).max()) / count
        result[name] = {
            "top1": mean,
            "train": sum(seen[name]) / len(seen[name]),
            "interval": wilson(mean * count, count),
            "seeds": values,
            "chance": chance,
        }
    return {"questions": result, "training": training}


def _held_out(count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(validation, the rest) of the training clips: test clips have no say in what is chosen."""
    rows = np.random.default_rng(seed).permutation(count)
    held = max(1, round(_HELD_OUT * count))
    return rows[:held], rows[held:]


def _neighbours(
    train: Features,
    test: Features,
    classes: Mapping[str, int],
    found: dict[str, list[float]],
    seen: dict[str, list[float]],
) -> dict[str, Any]:
    """Votes of the k nearest training clips by cosine, weighted by exp(cosine / temperature); k is
    chosen on the validation clips. Training clips are asked without themselves."""
    bank = torch.from_numpy(train.tokens[:, 0])
    mean, std = bank.mean(0), bank.std(0) + 1e-6
    bank = functional.normalize((bank - mean) / std, dim=1)
    asked = functional.normalize((torch.from_numpy(test.tokens[:, 0]) - mean) / std, dim=1)
    held, rest = (torch.from_numpy(rows) for rows in _held_out(len(bank), 0))

    def right(near: Tensor, rows: Tensor, k: int, truth: Mapping[str, Tensor]) -> dict[str, float]:
        cosine, place = near.topk(min(k, near.shape[1]), dim=1)
        weight = (cosine / _NEIGHBOUR_TEMPERATURE).exp()
        scores = {}
        for name, count in classes.items():
            votes = torch.zeros(len(near), count).scatter_add_(
                1, train.labels[name][rows[place]], weight
            )
            scores[name] = accuracy(votes, truth[name])
        return scores

    held_truth = {name: values[held] for name, values in train.labels.items()}
    validation = [
        sum(right(bank[held] @ bank[rest].T, rest, k, held_truth).values()) for k in _NEIGHBOURS
    ]
    best = _NEIGHBOURS[int(np.argmax(validation))]
    every = torch.arange(len(bank))
    among = (bank @ bank.T).fill_diagonal_(-2.0)
    for into, near, truth in (
        (found, asked @ bank.T, test.labels),
        (seen, among, train.labels),
    ):
        for name, value in right(near, every, best, truth).items():
            into[name].append(value)
    return {"converged": True, "neighbours": best}


def questions(dataset: ClipDataset) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Number of classes and the labels of every question that a data set can ask."""
    if isinstance(dataset, MovingShapes | MovingTextures):
        labels = {
            name: torch.from_numpy(values)
            for name, values in dataset.factors(np.arange(len(dataset))).items()
        }
        return {name: len(values) for name, values in dataset.questions.items()}, labels
    labels = {"class": torch.tensor([dataset.label(i) for i in range(len(dataset))])}
    return {"class": dataset.num_classes}, labels


def group_of(question: str) -> str:
    """``appearance`` or ``motion`` for a factor of generated clips, else ``class``."""
    for factors in (moving_shapes, moving_textures):
        if question in factors.APPEARANCE:
            return "appearance"
        if question in factors.MOTION:
            return "motion"
    return "class"


def pixel_features(dataset: ClipDataset, spec: InputSpec) -> NDArray[np.float16]:
    """[clips, 1, frames * 8 * 8 * 3]: every frame scaled down to 8 x 8 pixels, nothing learned. A
    clip that cannot be read is a row of NaN."""
    small = ClipSpec(spec.frames, spec.stride, spec.fps, spec.height, spec.width)
    frames_read = 1 if dataset.still else spec.frames
    rows = np.full((len(dataset), 1, frames_read * 3 * _PIXEL_SIDE**2), np.nan, np.float16)
    for index in range(len(dataset)):
        try:
            pixels = dataset.read(index, small, 0.5).frames
        except BadClipError:
            continue
        frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        rows[index, 0] = functional.adaptive_avg_pool2d(frames, _PIXEL_SIDE).flatten().numpy()
    return rows


def run(cfg: ProbeConfig) -> dict[str, Any]:
    """Probes a run and what it is to be compared with; prints a table and writes the results as
    JSON."""
    world = distributed.start(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    bundle, trained_with, digest = load_bundle(cfg.run, cfg.checkpoint)
    data = trained_with.data if cfg.data is None else cfg.data
    if data.kind in GENERATED:
        data = replace(data, size=cfg.train_clips, test_size=cfg.test_clips)
    train = labelled(build_dataset(data, "train"))
    sets = {"train": train, "test": labelled(build_dataset(data, "test"), train.num_classes)}
    spec = InputSpec.of(trained_with, data.kind, cfg.frames, cfg.height, cfg.width)
    classes, _ = questions(sets["train"])
    labels = {split: questions(dataset)[1] for split, dataset in sets.items()}
    encoders = {"trained": (bundle.evaluation_encoder, digest)}
    if cfg.untrained:
        encoders["untrained"] = (untrained_encoder(trained_with), "untrained 0")
    # By kind of probe, then by encoder.
    results: dict[str, dict[str, Any]] = {kind: {} for kind in cfg.kinds}
    for name, (encoder, identity) in encoders.items():
        parts = {}
        for split, dataset in sets.items():
            key = cache_key(
                identity,
                asdict(trained_with.model),
                asdict(data),
                split,
                content(dataset),
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
            parts[split] = Features(tokens, labels[split]).at_rows(readable(tokens, dataset))
        for kind in cfg.kinds:
            seen = parts
            if kind == "attentive" and cfg.attentive_levels == "last":
                seen = {split: part.last(trained_with.model.width) for split, part in parts.items()}
            results[kind][name] = probed(cfg, kind, seen["train"], seen["test"], classes)
    if cfg.pixels:
        for split, dataset in sets.items():
            tokens = pixel_features(dataset, spec)
            parts[split] = Features(tokens, labels[split]).at_rows(readable(tokens, dataset))
        # One token: there is nothing to attend to.
        for kind in (kind for kind in cfg.kinds if kind != "attentive"):
            results[kind]["pixels"] = probed(cfg, kind, parts["train"], parts["test"], classes)
    report = {
        "run": str(cfg.run),
        "weights": digest,
        "data": data.kind,
        "input": asdict(spec),
        "train_clips": len(parts["train"].tokens),
        "test_clips": len(parts["test"].tokens),
        "steps": cfg.steps,
        "results": results,
    }
    path = cfg.run / "probe.json" if cfg.output is None else cfg.output
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    show(report)
    _log.info("wrote %s", path)
    return report


def show(report: Mapping[str, Any]) -> None:
    """The results as a table for each kind of probe: a row per question, appearance before motion,
    test and training accuracy; then a sentence for every probe that has not converged."""
    for kind, results in report["results"].items():
        # Narrow enough for 80 columns: the group is a row of its own.
        table = Table(
            title=f"{kind} probe, top-1 in % [95 % interval], training clips; "
            f"{report['test_clips']} test clips",
            box=SIMPLE,
        )
        for column in ("question", "chance", *results):
            table.add_column(column, no_wrap=True)
        last = ""
        for name, value in results["trained"]["questions"].items():
            group = group_of(name)
            if group not in (last, "class"):
                table.add_row(f"[bold]{group}[/bold]")
            last = group
            table.add_row(
                name,
                f"{100 * value['chance']:.0f}",
                *(_cell(one["questions"][name]) for one in results.values()),
            )
        Console().print(table)
        for name, one in results.items():
            if not one["training"]["converged"]:
                _log.warning(
                    "the %s probe of %s has not converged in %d steps: its loss was still falling; "
                    "raise steps before reading its numbers",
                    kind,
                    name,
                    report["steps"],
                )


def _cell(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    test = f"{100 * value['top1']:.1f} [{100 * low:.0f},{100 * high:.0f}]"
    return f"{test} {100 * value['train']:.0f}"
