"""Fills the generated parts of README.md and of the pages under docs from the code and from the
committed records, and draws their pictures.

    python -m benchmarks.readme            writes them
    python -m benchmarks.readme --check    exits 1 when a file differs from what the code and the
                                           records say

A part is a block `<!-- generated: NAME [ARGUMENT] -->` ... `<!-- end -->`; PARTS says who writes
it. PICTURES are files of their own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import (
    architecture,
    code_tables,
    compare_checkouts,
    efficiency_page,
    headlines,
    report_text,
    time_masks,
)
from benchmarks.records import (
    RESULTS,
    ROOT,
    Record,
    clock,
    devices,
    ratio,
    read,
)

BLOCK = re.compile(r"(<!-- generated: (\w+)(?: (\S+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def pictures(paths: Iterable[Path]) -> list[str]:
    return [f"![{path.stem.replace('_', ' ')}]({path.relative_to(ROOT)})" for path in paths]


def _records_of(op: str | None) -> list[tuple[Any, list[Record]]]:
    return [(d, d.tables[op]) for d in devices() if op in d.tables]


def measured(op: str | None) -> str:
    """Every comparison of an op: a section for each device, a table for each dtype and pass."""
    lines: list[str] = []
    for device, records in _records_of(op):
        load = max(record.get("load_average") or 0.0 for record in records)
        lines += [
            "",
            f"## {device.title}",
            "",
            f"Record: `{device.path(str(op))}`. {device.clock}, unless a row says otherwise; load "
            f"average up to {load:.0f}.",
        ]
        for dtype, pass_name in dict.fromkeys((r["dtype"], r["pass"]) for r in records):
            lines += [
                "",
                f"### {device.short}, {dtype}, {pass_name}",
                "",
                "| case | baseline | backend | baseline's time / ours |",
                "|---|---|---|---|",
            ]
            lines += [
                f"| {r['case']} | {r['baseline']} | {r['backend']} | {device.cell(r)} |"
                for r in records
                if (r["dtype"], r["pass"]) == (dtype, pass_name)
            ]
    return "\n".join(lines).strip() or "No record is committed yet."


def summary(op: str | None) -> str:
    """A few rows of an op, a column for each device and dtype."""
    rows = headlines.SUMMARY.get(str(op), ())
    shown = headlines.columns([(str(op), *row) for row in rows])
    if not shown:
        return "No record is committed yet."
    lines = [
        f"| case | pass | baseline | {' | '.join(column.title for column in shown)} |",
        f"|{'---|' * (3 + len(shown))}",
    ]
    for row in rows:
        cells = [column.device.cell(column.record(str(op), *row)) for column in shown]
        lines.append(f"| {' | '.join((*row, *cells))} |")
    return "\n".join(lines)


def machines(_: str | None) -> str:
    """The devices that records are committed of, the one measured last first."""
    lines = ["| device | folder of records | ops | last record |", "|---|---|---|---|"]
    for device in devices():
        ops = ", ".join(device.tables)
        lines.append(
            f"| {device.title} | `benchmarks/results/{device.key}` | {ops} | {device.newest[:10]} |"
        )
    return "\n".join(lines)


def findings(name: str | None) -> str:
    """What a committed sweep ("DEVICE/NAME") answers, in sentences computed from its cells."""
    path = RESULTS / f"{name}.json"
    record = read(path)
    at = record["settings"]
    where = (
        f"{path.parent.name}, size {at['size']}, {at['frames']} frames, batch {at['batch']}, "
        f"{at['dtype']}"
    )
    return "\n".join(
        [
            f"On {where} (`{path.relative_to(ROOT)}`):",
            "",
            *(f"- {sentence}" for sentence in report_text.findings(record)),
        ]
    )


def sweep(name: str | None) -> str:
    """Findings of a sweep and its plots."""
    plots = (RESULTS / f"{name}_{part}.png" for part in ("throughput", "overhead"))
    return "\n".join([findings(name), "", *pictures(plot for plot in plots if plot.exists())])


def sample_efficiency(_: str | None) -> str:
    """Tables and plots of the sample-efficiency study, of the cells that are on record."""
    folder = RESULTS / "sample_efficiency"
    plots = pictures(sorted(folder.glob("*.png")))
    return "\n".join([efficiency_page.text(folder / "records.jsonl"), "", *plots]).strip()


def integration(name: str | None) -> str:
    """What acceleration does to one code base: attention alone and an encoder step, times and peak
    memory of both sides."""
    lines: list[str] = []
    for device, table in _records_of("integrations"):
        records = [r for r in table if r["baseline"] == name and r["status"] == "ok"]
        if not records:
            continue
        lines += [
            "",
            f"{device.title}, torch {records[0]['torch']}, "
            f"{'; '.join(sorted(set(map(clock, records))))}; "
            f"record: `{device.path('integrations')}`",
            "",
            "| what | px, tokens | dtype | pass | ms: untouched, accelerated | ratio of times | "
            "peak MiB: untouched, accelerated |",
            "|---|---|---|---|---|---|---|",
        ]
        for record in records:
            _, part, width, *_ = record["case"].split("/")
            details = record["details"]
            times = [f"{record[side]['median_ms']:.1f}" for side in ("reference", "candidate")]
            peaks = [record[f"{side}_peak_bytes"] for side in ("reference", "candidate")]
            memory = ", ".join(
                "unknown" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks
            )
            cells = [
                f"{part}, {width}",
                f"{details['resolution']}, {details['tokens']}",
                record["dtype"],
                record["pass"],
                ", ".join(times),
                ratio(record),
            ]
            lines.append(f"| {' | '.join(cells)} | {memory} |")
    return "\n".join(lines).strip() or "No record is committed yet."


def checkouts(_: str | None) -> str:
    """Every kernel of two commits, of each machine that compared them."""
    found = [
        compare_checkouts.table(json.loads(path.read_text(encoding="utf-8")))
        + f"\n\nRecord: `{path.relative_to(ROOT)}`."
        for path in sorted(RESULTS.glob("*/checkouts.json"))
    ]
    return "\n\n".join(found) or "No record is committed yet."


PARTS: dict[str, Callable[[str | None], str]] = {
    "backends": code_tables.backends,
    "objectives": code_tables.objective_sections,
    "variants": code_tables.variants,
    "context": code_tables.context,
    "options": code_tables.command_options,
    "published": code_tables.published_behaviour,
    "headlines": lambda _: headlines.table(),
    "machines": machines,
    "summary": summary,
    "measured": measured,
    "findings": findings,
    "sweep": sweep,
    "sample_efficiency": sample_efficiency,
    "integration": integration,
    "checkouts": checkouts,
}
PICTURES: dict[str, Callable[[], str]] = {
    "docs/pictures/architecture.svg": architecture.picture,
    "docs/pictures/speedups.svg": headlines.bars,
    "docs/pictures/time_masks.svg": time_masks.picture,
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, folder: Path) -> str:
    """The text of a page in `folder`, with every generated block made anew; its links lead from
    there."""
    up = "../" * len(folder.relative_to(ROOT).parts)

    def made(match: re.Match[str]) -> str:
        if match[2] not in PARTS:
            names = ", ".join(PARTS)
            raise ValueError(f"readme: a part must be one of {names}, got {match[2]!r}.")
        part = PARTS[match[2]](match[3]).replace("](benchmarks/", f"]({up}benchmarks/")
        return f"{match[1]}{part}\n{match[5]}"

    return BLOCK.sub(made, text)


def generated() -> dict[Path, str]:
    """What every page and picture has to hold."""
    contents = {p: filled(p.read_text(encoding="utf-8"), p.parent) for p in pages()}
    return contents | {ROOT / name: draw() for name, draw in PICTURES.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path, content in generated().items():
        if path.exists() and path.read_text(encoding="utf-8") == content:
            continue
        stale.append(path)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    if check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        print(
            f"{names} differs from the code or the records; run: python -m benchmarks.readme",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
