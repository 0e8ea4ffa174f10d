"""Measures one resolution of a sweep: every group and mode on every backend in palindromic rounds,
then each objective alone.

A round runs all sides in order and then in reverse order, so that drift of the machine hits them
alike (A B B A with more letters). A side that does not fit or is not supported is recorded with its
reason and leaves the rounds; the others go on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import contention, flop, objective_cost
from benchmarks.harness import timer
from benchmarks.memory import peak_memory
from benchmarks.workload import (
    STEP,
    Finetuning,
    Group,
    Pretraining,
    Workload,
    clip_source,
    make_batch,
    normalised,
)
from jepa.batch import Batch
from jepa.variants import VariantConfig
from jepa_kernels import BackendUnsupportedError

POOL = 2  # batches with different masks; rounds take turns
Row = dict[str, Any]


def failure(error: BaseException) -> tuple[str, str] | None:
    """("out of memory" | "unsupported", one line) of an error that a sweep may step over; None of
    any other."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, BackendUnsupportedError):
        return "unsupported", text
    if (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in text
        or "not enough memory" in text
    ):
        return "out of memory", text or "MemoryError"
    return None


@dataclass
class Side:
    """One thing to time: a mode, a group of variants, a backend."""

    kind: str
    group: str | None
    backend: str
    run: Callable[[int], dict[str, float]]
    flop: dict[str, flop.Flop]
    data_s: float
    rounds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    problem: tuple[str, str] | None = None
    cpu_time: bool = False  # which waiting does not inflate
    busy: bool = False
    usage: contention.Usage = contention.NOTHING

    def attempt(self, number: int) -> dict[str, float] | None:
        try:
            return self.run(number)
        except (RuntimeError, MemoryError, NotImplementedError) as error:
            self.problem = failure(error)
            if self.problem is None:
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None


def _mean(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {name: (first[name] + second[name]) / 2 for name in first}


@dataclass
class Bench:
    """The models and batches of one workload, made once for all its sides."""

    workload: Workload
    groups: Sequence[Group]
    modes: Sequence[str]
    batches: dict[Group, list[Batch]] = field(default_factory=dict)
    labelled: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    data_s: dict[Group | None, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read, now = clip_source(self.workload), timer(self.workload.clock, self.workload.device)
        needed: list[Group | None] = list(self.groups)
        if any(mode != "pretrain" for mode in self.modes):
            needed.append(None)
        for group in needed:
            spent = []
            for number in range(POOL):
                start = now()
                policy = None if group is None else group.policy
                loaded = make_batch(self.workload, policy, read, number)
                spent.append(now() - start)
                clips = normalised(self.workload, loaded)
                if group is None:
                    self.labelled.append((clips, loaded.labels))
                else:
                    self.batches.setdefault(group, []).append(loaded.for_step(clips, STEP))
            self.data_s[group] = min(spent)  # the first batch also opens files and builds tables
        self.pretraining = Pretraining(self.workload) if self.groups else None

    def sides(self, backends: Sequence[str]) -> Iterator[Side]:
        work = self.workload
        for group in self.groups:
            lengths = _lengths(self.batches[group][0])
            cost = flop.pretrain_step(
                work.model,
                work.tokens,
                work.batch,
                *lengths,
                online_target=group.target == "online",
            )
            for backend in backends:
                run = self._pretrain(group, backend)
                yield Side(
                    "pretrain",
                    group.name,
                    backend,
                    run,
                    cost,
                    self.data_s[group],
                    cpu_time=work.clock == "cpu",
                )
        for kind in ("finetune", "frozen"):
            if kind in self.modes or (kind == "finetune" and "finetune+objective" in self.modes):
                trainer = Finetuning(work, frozen=kind == "frozen")
                cost = flop.finetune_step(
                    work.model, work.tokens, work.batch, frozen=kind == "frozen"
                )
                for backend in backends:
                    yield Side(
                        kind,
                        None,
                        backend,
                        self._finetune(trainer, backend),
                        cost,
                        self.data_s[None],
                        cpu_time=work.clock == "cpu",
                    )

    def _pretrain(self, group: Group, backend: str) -> Callable[[int], dict[str, float]]:
        return lambda number: self.pretraining.step(
            group, self.batches[group][number % POOL], backend
        )

    def _finetune(self, trainer: Finetuning, backend: str) -> Callable[[int], dict[str, float]]:
        return lambda number: trainer.step(*self.labelled[number % POOL], backend)


def _lengths(batch: Batch) -> tuple[list[int], list[int]]:
    return batch.masks.context_cu.diff().tolist(), batch.masks.target_cu.diff().tolist()


def time_sides(sides: Sequence[Side], rounds: int, budget_s: float) -> None:
    """Warm every side, then palindromic rounds until `rounds` of them had the cores to themselves,
    or until one more would pass the budget (but at least one).

    Rounds in which other programs had the cores are dropped where others are left, and else mark
    every side as busy.
    """
    deadline = time.perf_counter() + budget_s
    for side in sides:
        side.attempt(0)
    longest = 0.0
    contended: list[bool] = []
    while contended.count(False) < rounds and len(contended) < 2 * rounds:
        started = time.perf_counter()
        if contended and started + longest > deadline:
            break
        number = len(contended)
        alive = [side for side in sides if side.problem is None]
        used = contention.NOTHING
        first = [watched(side, number) for side in alive]
        second = [watched(side, number) for side in reversed(alive)][::-1]
        for side, (one, before), (two, after) in zip(alive, first, second, strict=True):
            side.usage += before + after
            used += before + after
            if one is not None and two is not None:
                phases = _mean(one, two)
                side.phases.append(phases)
                side.rounds.append(sum(phases.values()))
        contended.append(used.contended and not all(s.cpu_time for s in alive))
        longest = max(longest, time.perf_counter() - started)
    clean = [number for number, bad in enumerate(contended) if not bad]
    for side in sides:
        side.busy = not clean
        # A side with a problem left some rounds; the others have them all.
        if clean and len(side.rounds) == len(contended):
            side.rounds = [side.rounds[number] for number in clean]
            side.phases = [side.phases[number] for number in clean]


def watched(side: Side, number: int) -> tuple[dict[str, float] | None, contention.Usage]:
    return contention.watched(lambda: side.attempt(number))


def side_row(side: Side, workload: Workload) -> Row:
    """The record of one side, peak memory of one more step included."""
    row: Row = {
        "kind": side.kind,
        "group": side.group,
        "backend": side.backend,
        "resolution": workload.resolution.name,
        "tokens": workload.tokens,
        "data_s": side.data_s,
        "flop_linear": _total(side, "linear"),
        "flop_attention": _total(side, "attention"),
    }
    if side.problem is None:
        with peak_memory(workload.device) as peak:
            side.attempt(0)
    if side.problem is not None:
        return row | {"status": side.problem[0], "reason": side.problem[1]}
    names = side.phases[0]
    return row | {
        "status": "ok",
        "rounds_s": side.rounds,
        "busy": side.busy,
        "contention": side.usage.as_dict(),
        "phases_s": {
            name: statistics.median(phases[name] for phases in side.phases) for name in names
        },
        "added_bytes": peak.added_bytes,
        "peak_bytes": peak.total_bytes,
    }


def _total(side: Side, part: str) -> float:
    """FLOP of a step: forward phases as they are, backward as the formula has it (stored under the
    part it belongs to)."""
    return sum(getattr(value, part) for value in side.flop.values())


def objective_rows(
    bench: Bench,
    group: Group,
    variants: dict[str, VariantConfig],
    backends: Sequence[str],
    rounds: int,
    budget_s: float,
) -> Iterator[Row]:
    """One row per distinct set of objectives of a group and backend; `budget_s` is for each."""
    batch = bench.batches[group][0]
    features = bench.pretraining.features(group, batch)
    for signature, config in variants.items():
        for backend in backends:
            row: Row = {
                "signature": signature,
                "group": group.name,
                "resolution": bench.workload.resolution.name,
                "backend": backend,
            }
            try:
                cost = objective_cost.measure(
                    bench.pretraining,
                    group,
                    config,
                    batch,
                    features,
                    backend=backend,
                    rounds=rounds,
                    budget_s=budget_s,
                )
            except (RuntimeError, MemoryError, NotImplementedError) as error:
                problem = failure(error)
                if problem is None:
                    raise
                yield row | {"status": problem[0], "reason": problem[1]}
                continue
            yield row | {
                "status": "ok",
                "added_s": cost.added_s,
                "interval_s": list(cost.interval_s),
                "samples": cost.samples,
                "busy": cost.busy,
                "added_bytes": cost.added_bytes,
            }
