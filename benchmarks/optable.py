"""One page of op timings: every bench file's quick cases, a few rounds each, within a time budget.

python -m benchmarks.optable --budget 60
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, machine
from benchmarks.discovery import bench_names, comparisons_of
from benchmarks.sweep_measure import failure
from benchmarks.sweep_tables import table

ROUNDS = harness.Settings(rounds=5, min_rounds=2, warmup=1, budget_s=1.0, measure_memory=False)
Row = dict[str, Any]


def run(budget_s: float, device: str = "cpu") -> tuple[list[Row], list[str]]:
    """(records, what the budget left out). Ops take turns, so that a slow one cannot use up the
    time of the others."""
    options = harness.Options(quick=True, device=device)
    deadline = time.perf_counter() + budget_s
    sources = {
        op: comparisons(options)
        for op in bench_names()
        if (comparisons := comparisons_of(op)) is not None
    }
    rows: list[Row] = []
    while sources and time.perf_counter() < deadline:
        for op in list(sources):
            item = next(sources[op], None)
            if item is None:
                del sources[op]
            elif time.perf_counter() < deadline:
                rows.append(_measured(op, item, device))
    return rows, sorted(sources)


def _measured(op: str, item: harness.Comparison, device: str) -> Row:
    """A record; where this machine cannot run the case, one with the reason."""
    try:
        return harness.measure(op, item, ROUNDS, device)
    except (RuntimeError, MemoryError, NotImplementedError) as error:
        problem = failure(error)
        if problem is None:
            raise
        names = {
            "case": item.case,
            "dtype": item.dtype,
            "pass": item.pass_name,
            "backend": item.backend,
            "baseline": item.baseline,
        }
        return {"op": op, **names, "status": problem[0], "reason": problem[1]}


def text(rows: Sequence[Row], unfinished: Sequence[str] = ()) -> str:
    lines = []
    for row in sorted(
        rows,
        key=lambda row: (
            row["op"],
            row["case"],
            row["dtype"],
            row["pass"],
            row["backend"],
            row["baseline"],
        ),
    ):
        head = [row["op"], row["case"], row["dtype"], row["pass"], row["backend"], row["baseline"]]
        if row["status"] != "ok":
            lines.append([*head, row["status"], "", "", ""])
            continue
        low, high = row["interval"]
        verdict = "loss" if high < 1 else "" if low > 1 else "even"
        verdict = "busy" if row.get("busy") else verdict
        lines.append(
            [
                *head,
                f"{row['ratio']:.2f}x",
                f"[{low:.2f}, {high:.2f}]",
                f"{row['candidate']['median_ms']:.3f}",
                verdict,
            ]
        )
    header = [
        "op",
        "case",
        "dtype",
        "pass",
        "backend",
        "baseline",
        "ratio",
        "interval",
        "our ms",
        "",
    ]
    busy = sum(bool(row.get("busy")) for row in rows)
    note = (
        f"\nbusy: in {busy} of {len(rows)} rows other programs had the cores; those times say "
        "nothing"
        if busy
        else ""
    )
    note += f"\nnot finished within the budget: {', '.join(unfinished)}" if unfinished else ""
    return (
        "ops against their baselines (ratio = baseline time / our time)\n"
        + table(header, lines)
        + note
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optable",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=60.0, help="seconds (default 60)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="append the records to this file")
    arguments = parser.parse_args(argv)
    rows, unfinished = run(arguments.budget, arguments.device)
    print(text(rows, unfinished))
    if machine.busy():
        print("note: this machine is busy; absolute times are inflated")
    if arguments.output is not None:
        harness.append_records(arguments.output, rows)
    return 1 if any(row["status"] == "wrong" for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
