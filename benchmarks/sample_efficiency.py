"""Do factorized latent dynamics improve sample efficiency? Pre-training runs of several variants,
data sizes, resolutions and seeds, each asked at several checkpoints.

python -m benchmarks.sample_efficiency              all cells that fit the budget, then the page
python -m benchmarks.sample_efficiency --reduced    two variants, two seeds, within 15 minutes
python -m benchmarks.sample_efficiency --variants baseline ld --clips 256 --seeds 0 1 --budget 3600
python -m benchmarks.sample_efficiency --page       tables and plots of what is there

Cells run one process a core, a whole seed of every variant before the next seed. Finished cells are
kept: a record is one line appended to records.jsonl, and the same command goes on with what is
missing. What does not fit the budget is named and left out. Protocol and answers: docs/study.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.efficiency_cell import (
    CHECKPOINTS,
    VARIANTS,
    Asked,
    Cell,
    run_cell,
    run_pixels,
    run_supervised,
    run_untrained,
)
from benchmarks.machine import REPOSITORY, cores
from jepa.masks import POLICY_NAMES

RECORDS = REPOSITORY / "benchmarks" / "results" / "sample_efficiency" / "records.jsonl"
# Seconds on one core until records say better: of a training step and of one question at 32 px.
STEP_S, ASK_S, SUPERVISED_S = 0.25, 15.0, 300.0
MARGIN = 1.15

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Something to run: `key` names it among records."""

    key: tuple[Any, ...]
    kind: str
    arguments: tuple[Any, ...] = field(compare=False)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two records the same measurement."""
    names = {
        "cell": ("variant", "masks", "side", "clips", "steps", "seed", "labels", "tests"),
        "untrained": ("side", "seed", "labels", "tests"),
        "pixels": ("side", "labels", "tests"),
        "supervised": ("side",),
    }[record["kind"]]
    return (record["kind"], *(record[name] for name in names))


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records, the last of each measurement. A line that was cut off is left out."""
    if not path.exists():
        return []
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            # Cut short when a run was killed: that measurement is made again.
            continue
        found[key_of(record)] = record
    return list(found.values())


def append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        # A last line that a kill cut short must not become part of the next.
        torn = file.seek(0, os.SEEK_END) > 0 and _last_byte(file) != b"\n"
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """In the order in which they are run: what cells are read beside, then seed by seed, from the
    first resolution and data size on."""
    asked = Asked(options.labels, options.tests)
    of = (asked.labels, asked.tests)
    for side in options.sides:
        for seed in options.seeds:
            yield Task(("untrained", side, seed, *of), "untrained", (side, seed, asked))
    for seed in options.seeds:
        for side in options.sides:
            for clips in options.clips:
                for masks in options.masks:
                    for variant in options.variants:
                        cell = Cell(variant, masks, side, clips, options.steps, seed)
                        key = ("cell", variant, masks, side, clips, options.steps, seed, *of)
                        yield Task(key, "cell", (cell, asked, options.runs))
    for side in options.sides:
        yield Task(("pixels", side, *of), "pixels", (side, asked))
        if options.supervised > 0:
            yield Task(("supervised", side), "supervised", (side, asked, options.supervised))
        for seed in range(options.null):
            if seed not in options.seeds:
                yield Task(("untrained", side, seed, *of), "untrained", (side, seed, asked))


RUNNERS = {
    "cell": run_cell,
    "untrained": run_untrained,
    "pixels": run_pixels,
    "supervised": run_supervised,
}


def expected_seconds(task: Task, seen: dict[tuple[Any, ...], float]) -> float:
    """From the same kind of work done before, or else a first guess, scaled by the tokens."""
    side = task.arguments[0].side if task.kind == "cell" else task.arguments[0]
    scale = (side / 32) ** 2
    if task.kind == "supervised":
        return seen.get(("supervised", side), SUPERVISED_S)
    if task.kind != "cell":
        return seen.get((task.kind, side), ASK_S * scale)
    cell = task.arguments[0]
    guess = scale * (STEP_S * cell.steps + ASK_S * len(CHECKPOINTS))
    return seen.get(("cell", side, cell.steps), guess)


def execute(task: Task) -> tuple[Task, dict[str, Any], float]:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    began = time.perf_counter()
    record = RUNNERS[task.kind](*task.arguments)
    return task, record, time.perf_counter() - began


def run(options: argparse.Namespace) -> list[Task]:
    """Runs what is missing; returns what was left out."""
    done = {key_of(record) for record in read_records(options.records)}
    todo = [task for task in tasks(options) if task.key not in done]
    deadline = time.perf_counter() + options.budget
    seen: dict[tuple[Any, ...], float] = {}
    print(described(todo, len(done), options, seen), flush=True)
    left_out: list[Task] = []
    waiting = list(todo)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        running: set[Future[tuple[Task, dict[str, Any], float]]] = set()
        while waiting or running:
            while waiting and len(running) < options.jobs:
                task = waiting.pop(0)
                needed = MARGIN * expected_seconds(task, seen)
                if time.perf_counter() + needed > deadline:
                    left_out.append(task)
                else:
                    running.add(pool.submit(execute, task))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task, record, seconds = future.result()
                append(options.records, record)
                side = record["side"]
                name = ("cell", side, record["steps"]) if task.kind == "cell" else (task.kind, side)
                # The slowest so far: a plan that is kept is worth more than one that is tight.
                seen[name] = max(seconds, seen.get(name, 0.0))
                rest = deadline - time.perf_counter()
                print(
                    f"{' '.join(map(str, task.key))}: {seconds:.0f} s, {len(waiting)} to go, "
                    f"{max(0.0, rest):.0f} s of the budget left",
                    flush=True,
                )
    if left_out:
        names = "\n".join(f"  {' '.join(map(str, task.key))}" for task in left_out)
        print(f"left out, for want of time ({len(left_out)}):\n{names}")
    return left_out


def described(
    todo: Sequence[Task], done: int, options: argparse.Namespace, seen: dict[tuple[Any, ...], float]
) -> str:
    needed = [MARGIN * expected_seconds(task, seen) for task in todo]
    lines = [
        f"sample efficiency: {len(todo)} measurements to do, {done} on record, about "
        f"{sum(needed) / 60:.0f} core minutes, {options.jobs} at a time, budget "
        f"{options.budget / 60:.0f} minutes"
    ]
    spent = 0.0
    for task, seconds in zip(todo, needed):
        spent += seconds / options.jobs
        if spent > options.budget:
            rest = len(todo) - todo.index(task)
            lines.append(f"the last {rest} are left out unless the machine is faster than expected")
            break
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.sample_efficiency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    made.add_argument("--masks", nargs="+", choices=POLICY_NAMES, default=["blocks"])
    made.add_argument("--sides", type=int, nargs="+", default=[32], help="pixels (default 32)")
    made.add_argument(
        "--clips", type=int, nargs="+", default=[0, 256, 1024], help="unique; 0: all are new"
    )
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    made.add_argument("--steps", type=int, default=400)
    made.add_argument("--labels", type=int, default=1536, help="labelled clips of a probe")
    made.add_argument("--tests", type=int, default=1536)
    made.add_argument("--null", type=int, default=20, help="untrained encoders (default 20)")
    made.add_argument(
        "--supervised", type=float, default=SUPERVISED_S, help="seconds of training on labels"
    )
    made.add_argument("--budget", type=float, default=8 * 3600.0, help="seconds (default 8 hours)")
    made.add_argument("--jobs", type=int, default=cores(), help="processes (default: the cores)")
    made.add_argument("--records", type=Path, default=RECORDS)
    made.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "sample_efficiency")
    made.add_argument("--page", action="store_true", help="draw what is there, run nothing")
    made.add_argument(
        "--reduced",
        action="store_true",
        help="baseline and ld, two seeds, new clips, half the steps, five untrained encoders, "
        "within 15 minutes, to runs/sample_efficiency/reduced.jsonl",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.reduced:
        options.variants, options.clips, options.seeds = ["baseline", "ld"], [0], [0, 1]
        options.steps, options.null = options.steps // 2, 5
        options.supervised = 0.0
        options.budget = min(options.budget, 14 * 60.0)
        options.records = options.runs / "reduced.jsonl"
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not options.page:
        run(options)
    # Late: drawing needs matplotlib, measuring does not.
    from benchmarks import efficiency_page

    print(efficiency_page.text(options.records))
    for path in efficiency_page.plotted(options.records, options.records.parent):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
