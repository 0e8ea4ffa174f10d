"""Turns what a GPU run brought back into what is committed: records, pages, preferences.

    python -m benchmarks.gpu_records runs/gpu

Whatever part of a run is there is taken; what is missing is named. Under
benchmarks/results/<device>/ it writes

- ``<op>.json``: our backends against each baseline, as the op benchmarks record them (appended);
- ``rows.json``: one row for each (op, case, backend), plain seconds, from which preferences follow;
- ``preferences.json``: what `benchmarks.preference_rows.derive` makes of these rows;
- ``sweep_<size>.json``: whole training steps, as the sweep recorded them;
- ``gpu.md``: the page: is it right, how fast is it, what failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_lines, harness, machine, preference_rows
from benchmarks.gpu_lines import Row
from benchmarks.sweep_tables import table
from jepa import atomic

ROWS_SCHEMA = 1


def newest(rows: Sequence[Row], *names: str) -> list[Row]:
    """The last row of every combination of `names`: a resumed run repeats what had failed."""
    found = {tuple(row[name] for name in names): row for row in rows}
    return list(found.values())


def checks(folder: Path) -> list[Row]:
    rows = gpu_lines.read(folder / "check" / "checks.jsonl")
    return newest(rows, "op", "case", "dtype", "direction", "backend")


def times(folder: Path) -> list[Row]:
    rows = [
        row for path in sorted((folder / "time").glob("*.jsonl")) for row in gpu_lines.read(path)
    ]
    return newest(rows, "op", "case", "dtype", "pass", "side")


def outcomes(folder: Path) -> list[Row]:
    rows = [
        row
        for path in sorted((folder / "test").glob("tests-*.jsonl"))
        for row in gpu_lines.read(path)
    ]
    return newest(rows, "test")


def steps(folder: Path) -> list[Row]:
    """How every step of the three commands ended."""
    found = []
    for part in ("check", "time", "test"):
        for path in sorted((folder / part).glob("*.status.json")):
            found.append({"part": part, **json.loads(path.read_text())})
    return found


def comparisons(rows: Sequence[Row]) -> Iterator[Row]:
    """Our sides against each baseline of the same case, in the op benchmarks' format."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            key = tuple(row[name] for name in ("op", "case", "dtype", "pass"))
            groups.setdefault(key, []).append(row)
    for group in groups.values():
        for ours in (row for row in group if row["ours"]):
            for theirs in (row for row in group if not row["ours"]):
                yield _comparison(ours, theirs)


def _comparison(ours: Row, theirs: Row) -> Row:
    pairs = zip(theirs["samples"], ours["samples"], strict=False)
    ratios = [other / own for other, own in pairs]
    return {
        "schema": harness.SCHEMA_VERSION,
        **{name: ours[name] for name in ("op", "case", "dtype", "pass", "details")},
        "backend": ours["side"],
        "baseline": theirs["side"],
        "seed": 0,
        "flush_cache": False,
        "clock": f"cuda events; ours: {ours['how']}; theirs: {theirs['how']}",
        **ours["machine"],
        "status": "ok",
        "samples": len(ratios),
        "ratio": statistics.median(ratios),
        "interval": list(harness.bootstrap_interval(ratios)),
        "candidate": ours["seconds"],
        "reference": theirs["seconds"],
        "candidate_peak_bytes": ours["peak_bytes"],
        "reference_peak_bytes": theirs["peak_bytes"],
        "candidate_launch_s": ours["launch_s"],
        "flop": ours["flop"],
        "bytes": ours["bytes"],
        "floor_ms": None,
        "floor_share": None,
    }


def plain_rows(rows: Sequence[Row], source: str) -> list[Row]:
    """{op, backend, device, dtype, size_class, case, forward_s, forward_backward_s, record}: one
    for each of our backends and cases; None where a pass was not measured."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if not row["ours"] or row["status"] != "ok":
            continue
        key = tuple(row[name] for name in ("op", "case", "dtype", "side"))
        plain = found.setdefault(
            key,
            {
                "op": preference_rows.op_of(row),
                "backend": row["side"],
                "device": row["machine"]["device_kind"],
                "dtype": row["dtype"],
                "size_class": row["size_class"],
                "case": row["case"],
                "forward_s": None,
                "forward_backward_s": None,
                "record": source,
            },
        )
        name = "forward_s" if row["pass"] == "forward" else "forward_backward_s"
        plain[name] = row["seconds"]["median_ms"] / 1e3
    return list(found.values())


def page(folder: Path, device: str) -> str:
    """The run in Markdown."""
    lines = [f"# {device}", "", "## Steps", "", "```text", _step_table(steps(folder)), "```", ""]
    rows = checks(folder)
    wrong = [row for row in rows if row["status"] != "ok"]
    lines += [
        "## Against float64",
        "",
        f"{len(rows) - len(wrong)} of {len(rows)} rows are right.",
        "",
    ]
    for row in wrong:
        names = " ".join(str(row[n]) for n in ("op", "case", "dtype", "direction", "backend"))
        lines.append(f"- {names}: {row['status']}: {row['reason'].strip().splitlines()[-1]}")
    lines += ["", "## Seconds", "", "```text", _time_table(times(folder)), "```", ""]
    tested = outcomes(folder)
    failed = [row for row in tested if row["outcome"] == "failed"]
    lines += ["## Device tests", "", f"{len(tested)} tests, {len(failed)} failed.", ""]
    lines += [f"- {row['test']}" for row in failed]
    return "\n".join(lines).rstrip() + "\n"


def _step_table(rows: Sequence[Row]) -> str:
    names = ("part", "step", "status", "exit", "seconds")
    return table(list(names), [[str(row[name]) for name in names] for row in rows])


def _time_table(rows: Sequence[Row]) -> str:
    header = ["op", "case", "dtype", "pass", "side", "ms", "TFLOP/s", "GB/s", "launch us", "MiB"]
    lines = []
    for row in rows:
        head = [str(row[name]) for name in ("op", "case", "dtype", "pass", "side")]
        if row["status"] != "ok":
            lines.append([*head, row["status"], "", "", "", ""])
            continue
        median = row["seconds"]["median_ms"]
        numbers = (
            (row["flop"], 1e-9 / median, ".1f"),
            (row["bytes"], 1e-6 / median, ".0f"),
            (row["launch_s"], 1e6, ".0f"),
            (row["peak_bytes"], 2**-20, ".0f"),
        )
        cells = ["" if n is None else format(n * factor, how) for n, factor, how in numbers]
        lines.append([*head, f"{median:.4f}", *cells])
    return table(header, lines)


def write(folder: Path, results: Path) -> list[str]:
    """Writes everything that `folder` holds; returns what it lacks."""
    timed, lacking = times(folder), []
    sweeps = [p for p in sorted((folder / "test").glob("sweep_*.json")) if p.stem.isidentifier()]
    measured = (*timed, *checks(folder), *(json.loads(path.read_text()) for path in sweeps))
    origin = next((record["machine"] for record in measured), None)
    if origin is None:
        raise ValueError(f"gpu_records: {folder} must hold the output of a GPU run, got no rows.")
    target = results / origin["device_key"]
    target.mkdir(parents=True, exist_ok=True)
    atomic.write_text(target / "gpu.md", page(folder, origin["device"]))
    if timed:
        by_op: dict[str, list[Row]] = {}
        for record in comparisons(timed):
            by_op.setdefault(record["op"], []).append(record)
        for op, records in by_op.items():
            harness.append_records(target / f"{op}.json", records)
        rows = plain_rows(timed, f"benchmarks/results/{origin['device_key']}/rows.json")
        _write_rows(target / "rows.json", {"machine": origin, "rows": rows})
        derived = preference_rows.derive(rows)
        _write_rows(target / "preferences.json", {"machine": origin, "rows": derived})
    else:
        lacking.append("times (run: make gpu-time)")
    for name, found, command in (
        ("checks", checks(folder), "gpu-check"),
        ("device tests", outcomes(folder), "gpu-test"),
    ):
        if not found:
            lacking.append(f"{name} (run: make {command})")
    for path in sweeps:
        shutil.copyfile(path, target / path.name)
    return lacking if sweeps else [*lacking, "sweeps (run: make gpu-test)"]


def _write_rows(path: Path, content: dict[str, Any]) -> None:
    """One row a line, so that a change is a readable diff."""
    rows = ",\n".join(json.dumps(row, sort_keys=True) for row in content["rows"])
    head = f'{{"schema": {ROWS_SCHEMA}, "machine": {json.dumps(content["machine"])}, "rows": [\n'
    atomic.write_text(path, f"{head}{rows}\n]}}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_records",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the $OUT of a run")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    arguments = parser.parse_args(argv)
    for name in write(arguments.folder, arguments.results):
        print(f"not there: {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
