"""The resolution sweep: how the training and fine-tuning throughput of every variant scales with
frame resolution.

    # every named variant, micro, 64 to 224 px, within six minutes
    python -m benchmarks.sweep
    python -m benchmarks.sweep --size tiny --resolutions 64,112,160,224 --budget 1500 \\
        --output runs/tiny.json
    python -m benchmarks.sweep --variants baseline,ld --backends torch,cpu --data tensors
    # expected step time and memory, from a finished sweep
    python -m benchmarks.sweep --predict 512x512x32 --batch 8

Shared work is timed once: variants of one mask policy and target kind differ in their objectives
only, so the other phases are measured per group, and each set of objectives alone, paired with the
baseline's. Finished resolutions are kept: the same command goes on where it was stopped.
`benchmarks.report` turns the record into a page.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import flop, machine, optable, sweep_plan, sweep_record, sweep_tables
from benchmarks.harness import CLOCKS, timer
from benchmarks.objective_cost import is_baseline, signature
from benchmarks.resolutions import Resolution, parse_frames, parse_resolution
from benchmarks.sweep_measure import Bench, failure, objective_rows, side_row, time_sides
from benchmarks.workload import Group, Workload
from jepa.allocator import keep_freed_memory
from jepa.models.sizes import SIZES
from jepa.variants import VARIANTS, VariantConfig, variant
from jepa_kernels import BACKENDS

CHOICES = ("auto", *BACKENDS)
MODES = ("pretrain", "finetune", "finetune+objective", "frozen")
DEFAULT_OUTPUT = machine.REPOSITORY / "runs" / "bench" / "sweep.json"
STEP_SHARE = 0.6  # of a resolution's time; the rest is for the objectives
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    what = made.add_argument_group("what to measure")
    what.add_argument(
        "--variants",
        type=_names,
        default=list(VARIANTS),
        help=f"comma-separated names (default: all {len(VARIANTS)})",
    )
    what.add_argument(
        "--resolutions",
        type=_names,
        default=["64", "112", "160", "224"],
        help="pixels: 224, 240x320, ucf101 (default 64,112,160,224)",
    )
    what.add_argument(
        "--frames",
        type=parse_frames,
        default=16,
        help="frames per clip, or still, 8f, 16f, 32f, 64f (default 16)",
    )
    what.add_argument(
        "--size", default="micro", choices=list(SIZES), help="model size (default micro)"
    )
    what.add_argument(
        "--batch",
        type=int,
        default=2,
        help="clips per step (default 2); with --predict: clips of the predicted step",
    )
    what.add_argument(
        "--dtype",
        default="fp32",
        choices=list(DTYPES),
        help="fp32, or bf16 autocast (default fp32)",
    )
    what.add_argument(
        "--backends",
        type=_names,
        default=["torch", "auto"],
        help=f"of {', '.join(CHOICES)} (default torch,auto)",
    )
    what.add_argument(
        "--modes", type=_names, default=list(MODES), help=f"of {', '.join(MODES)} (default: all)"
    )
    what.add_argument(
        "--data",
        default="moving_shapes",
        help="moving_shapes, tensors (no loader), or a UCF-101 folder (default moving_shapes)",
    )
    what.add_argument(
        "--truncate",
        default="none",
        choices=["none", "batch_min"],
        help="batch_min: cut masks as published code does",
    )
    what.add_argument(
        "--encoder", help="your own encoder, package.module:factory, called with the ModelConfig"
    )
    what.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one",
    )
    how = made.add_argument_group("how long and where to")
    how.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="palindromic rounds per resolution, if the budget allows (default 5)",
    )
    how.add_argument(
        "--budget",
        type=float,
        default=330.0,
        help="seconds; what does not fit is left out and named (default 330)",
    )
    how.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    how.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: CPU time with --threads 1, for a busy machine (default wall)",
    )
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        help="record (default runs/bench/sweep.json); its page lies beside it",
    )
    how.add_argument(
        "--fresh",
        action="store_true",
        help="measure everything again instead of keeping finished resolutions",
    )
    how.add_argument(
        "--plan",
        action="store_true",
        help="print what would run and what would be left out, then stop",
    )
    how.add_argument(
        "--main-job",
        action="store_true",
        help="also time every op and print its table (what `make bench` runs)",
    )
    how.add_argument(
        "--op-budget",
        type=float,
        default=60.0,
        help="seconds for the op table of --main-job (default 60), out of --budget",
    )
    how.add_argument("--no-report", action="store_true", help="record and tables only, no page")
    ask = made.add_argument_group("asking a finished sweep")
    ask.add_argument(
        "--predict",
        metavar="HxWxFRAMES",
        help="expected step time and memory of a size that was not measured",
    )
    ask.add_argument("--record", type=Path, help="the sweep to predict from (default: --output)")
    return made


def check(arguments: argparse.Namespace) -> list[Resolution]:
    """Values that argparse cannot judge; one sentence each."""
    for name, allowed in (("variants", VARIANTS), ("backends", CHOICES), ("modes", MODES)):
        chosen = getattr(arguments, name)
        if not chosen:
            raise ValueError(f"sweep: {name} must not be empty.")
        for value in chosen:
            if value not in allowed:
                raise ValueError(f"sweep: {name} must be of {', '.join(allowed)}, got {value!r}.")
    for name in ("batch", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"sweep: {name} must be at least 1, got {getattr(arguments, name)}.")
    sizes = sorted(
        (parse_resolution(text) for text in arguments.resolutions), key=lambda size: size.pixels
    )
    if not sizes:
        raise ValueError("sweep: resolutions must not be empty.")
    for size in sizes:
        size.grid(arguments.frames)
    return sizes


def workload(arguments: argparse.Namespace, resolution: Resolution) -> Workload:
    return Workload(
        resolution=resolution,
        model=SIZES[arguments.size],
        frames=arguments.frames,
        batch=arguments.batch,
        precision=arguments.dtype,
        device=arguments.device,
        data=arguments.data,
        truncate=arguments.truncate,
        encoder=arguments.encoder,
        seed=arguments.seed,
        clock=arguments.clock,
    )


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a cell depends on, apart from its resolution; a record with other settings is not
    continued."""
    names = (
        "variants",
        "frames",
        "size",
        "batch",
        "dtype",
        "backends",
        "modes",
        "data",
        "truncate",
        "encoder",
        "device",
        "seed",
        "threads",
    )
    return {name: getattr(arguments, name) for name in names}


def fresh_record(
    arguments: argparse.Namespace, configs: dict[str, VariantConfig]
) -> dict[str, Any]:
    device = arguments.device
    return {
        "schema": sweep_record.SCHEMA_VERSION,
        "kind": "sweep",
        "command": "python -m benchmarks.sweep " + shlex.join(arguments.command),
        "settings": settings_of(arguments),
        "machine": machine.provenance(device),
        "peak_flops": machine.peak_flops(device, DTYPES[arguments.dtype]),
        "peak_bandwidth": machine.peak_bandwidth(device),
        "flop_crossover_tokens": flop.crossover_tokens(SIZES[arguments.size]),
        "groups": {
            name: Group.of(config, arguments.truncate).name for name, config in configs.items()
        },
        "signatures": {
            name: None if is_baseline(config) else signature(config)
            for name, config in configs.items()
        },
        "sizes": [],
        "left_out": [],
        "measured": [],
        "objectives": [],
        "spent_s": {},
        "cells": [],
        "fits": [],
        "ops": [],
    }


def measure_resolution(
    record: dict[str, Any],
    work: Workload,
    configs: dict[str, VariantConfig],
    arguments: argparse.Namespace,
    budget_s: float,
    rounds: int,
) -> None:
    """Adds one resolution's rows to the record, or puts them in the place of those of fewer
    rounds."""
    started = time.perf_counter()
    pretrains = any(mode in ("pretrain", "finetune+objective") for mode in arguments.modes)
    groups = (
        list(dict.fromkeys(Group.of(config, arguments.truncate) for config in configs.values()))
        if pretrains
        else []
    )
    try:
        bench = Bench(work, groups, arguments.modes)
    except (RuntimeError, MemoryError, NotImplementedError) as error:
        problem = failure(error)
        if problem is None:
            raise
        record["left_out"].append(
            {
                "resolution": work.resolution.name,
                "tokens": work.tokens,
                "reason": ": ".join(problem),
            }
        )
        return
    sides = list(bench.sides(arguments.backends))
    time_sides(sides, rounds, STEP_SHARE * budget_s)
    for side in sides:
        sweep_record.replace_row(
            record["measured"],
            side_row(side, work),
            *("kind", "group", "backend", "resolution"),
        )
    jobs = {}
    for group in groups:
        members = [
            config
            for config in configs.values()
            if Group.of(config, arguments.truncate) == group and not is_baseline(config)
        ]
        jobs[group] = {signature(config): config for config in members}
    count = len(arguments.backends) * sum(len(variants) for variants in jobs.values())
    remaining = max(0.0, started + budget_s - time.perf_counter())
    for group, variants in jobs.items():
        if variants:
            for row in objective_rows(
                bench, group, variants, arguments.backends, rounds, remaining / max(1, count)
            ):
                sweep_record.replace_row(
                    record["objectives"], row, "signature", "group", "backend", "resolution"
                )
    size = {
        "resolution": work.resolution.name,
        "tokens": work.tokens,
        "grid": list(work.grid),
        "pixels": work.resolution.pixels,
        "frames": work.frames,
        "batch": work.batch,
        "rounds": rounds,
    }
    sweep_record.replace_row(record["sizes"], size, "resolution")
    spent = record["spent_s"]
    name = work.resolution.name
    spent[name] = spent.get(name, 0.0) + time.perf_counter() - started


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what is missing and fits, and returns the record (also written after every
    resolution)."""
    sizes = check(arguments)
    configs = {name: variant(name) for name in arguments.variants}
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    timer(arguments.clock, arguments.device)
    if arguments.device == "cpu":
        keep_freed_memory()  # as jepa.pretrain does; for every backend alike
    record = fresh_record(arguments, configs)
    if arguments.output.exists() and not arguments.fresh:
        earlier = sweep_record.load(arguments.output)
        if earlier["settings"] == record["settings"]:
            done = [row["resolution"] for row in earlier["sizes"]]
            print(
                f"kept from {arguments.output}: {', '.join(done) or 'nothing'} (--fresh measures "
                "again)"
            )
            earlier["left_out"] = []
            record = earlier
        else:
            print(f"{arguments.output} has other settings and is replaced")
    todo = [
        work
        for work in (workload(arguments, size) for size in sizes)
        if not sweep_record.find(record["sizes"], resolution=work.resolution.name)
    ]
    plan = sweep_plan.Plan(record, configs, arguments)
    print(plan.describe(todo), flush=True)
    if arguments.plan:
        return record

    def measure(work: Workload, budget_s: float, rounds: int) -> None:
        began = time.perf_counter()
        measure_resolution(record, work, configs, arguments, budget_s, rounds)
        plan.learn(work, rounds, time.perf_counter() - began)
        record["sizes"].sort(key=lambda row: row["tokens"])
        record["cells"] = sweep_record.assemble(record)
        record["fits"] = sweep_record.fits(record["cells"])
        sweep_record.save(arguments.output, record)
        print(sweep_tables.resolution_line(record, work.resolution.name), flush=True)

    # One round of every size first: no size is left out for the sake of another's intervals.
    for work in todo:
        reason = plan.refusal(work)
        if reason is not None:
            record["left_out"].append(
                {"resolution": work.resolution.name, "tokens": work.tokens, "reason": reason}
            )
            print(f"{work.resolution.name:>8} px: left out, {reason}", flush=True)
            continue
        measure(work, plan.seconds(work, 1), 1)
    again = [work for work in todo if sweep_record.find(record["sizes"], **named(work))]
    if arguments.rounds > 1:
        for number, work in enumerate(again):
            rounds, budget_s = plan.more_rounds(again[number:])
            if rounds > 1:
                measure(work, budget_s, rounds)
    record["cells"] = sweep_record.assemble(record)
    record["fits"] = sweep_record.fits(record["cells"])
    sweep_record.save(arguments.output, record)
    return record


def named(work: Workload) -> dict[str, str]:
    return {"resolution": work.resolution.name}


def predict(arguments: argparse.Namespace) -> str:
    parts = arguments.predict.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(
            f"sweep: predict must look like HEIGHTxWIDTHxFRAMES, got {arguments.predict!r}."
        )
    size = Resolution(int(parts[0]), int(parts[1]))
    path = arguments.record if arguments.record is not None else arguments.output
    if not path.exists():
        raise ValueError(
            f"sweep: record must be a finished sweep, got {path}, which does not exist."
        )
    return sweep_tables.prediction(
        sweep_record.load(path), size, int(parts[2]), arguments.batch, path
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    arguments.command = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments.predict is not None:
            print(predict(arguments))
            return 0
        if arguments.main_job:
            arguments.budget = max(30.0, arguments.budget - arguments.op_budget)
        record = run(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.plan:
        return 0
    print(sweep_tables.summary(record))
    if arguments.main_job:
        record["ops"], unfinished = optable.run(arguments.op_budget, arguments.device)
        sweep_record.save(arguments.output, record)
        print(optable.text(record["ops"], unfinished) + "\n")
    if not arguments.no_report and record["sizes"]:
        from benchmarks import report

        page = report.write(record, arguments.output.with_suffix(".html"), source=arguments.output)
        print(f"page: {page}")
    print(f"record: {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
