"""The sweep's page: one self-contained HTML file, its figures as PNG and SVG, its cells as CSV; and
the comparison of two sweeps.

    # page, figures and CSV beside the record
    python -m benchmarks.report runs/bench/sweep.json
    # what got faster and what got slower, beyond noise
    python -m benchmarks.report BEFORE.json AFTER.json

The page needs no network: style, script, figures and tables are in the file. It is written for a
phone as well as for a wide screen, for light and dark, and its tables sort by any column.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report_compare, report_figures, report_page, sweep_record

CELL_FIELDS = (
    "mode",
    "variant",
    "backend",
    "resolution",
    "tokens",
    "frames",
    "batch",
    "status",
    "reason",
    "step_ms",
    "interval_ms",
    "samples",
    "clips_per_s",
    "clips_per_s_with_data",
    "tokens_per_s",
    "data_ms",
    "phases_ms",
    "flop",
    "achieved_flops",
    "peak_share",
    "peak_bytes",
    "activation_bytes",
    "objective_added_ms",
    "overhead",
    "overhead_interval",
    "over_baseline",
    "over_baseline_interval",
    "speedup",
    "speedup_interval",
)


def write_csv(record: dict[str, Any], path: Path) -> None:
    """One row per cell; intervals become `low high`, phases one column each."""
    phases = sorted({name for cell in record["cells"] for name in cell.get("phases_ms", {})})
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                *(name for name in CELL_FIELDS if name != "phases_ms"),
                *(f"phase_{name}_ms" for name in phases),
            ]
        )
        for cell in record["cells"]:
            values = []
            for name in CELL_FIELDS:
                if name == "phases_ms":
                    continue
                value = cell.get(name, "")
                values.append(
                    f"{value[0]:.6g} {value[1]:.6g}" if isinstance(value, list) else value
                )
            rows.writerow([*values, *(cell.get("phases_ms", {}).get(name, "") for name in phases)])


def write_figures(record: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Every figure as SVG and PNG, named <stem>_<figure>."""
    written = []
    for name, (draw, _) in report_figures.FIGURES.items():
        figure = draw(record)
        for suffix in ("svg", "png"):
            path = folder / f"{stem}_{name}.{suffix}"
            figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
    return written


def write(record: dict[str, Any], page: Path, *, source: Path) -> Path:
    """The page, and beside it the CSV and the figures. `source` is the record the page links to."""
    if not record["sizes"]:
        raise ValueError("report: record must hold at least one measured resolution, got none.")
    page.parent.mkdir(parents=True, exist_ok=True)
    table = page.with_suffix(".csv")
    write_csv(record, table)
    figures = write_figures(record, page.parent, page.stem)
    links = {"record (JSON)": os.path.relpath(source, page.parent), "cells (CSV)": table.name}
    page.write_text(
        report_page.render(record, links, [path.name for path in figures]), encoding="utf-8"
    )
    return page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "records", type=Path, nargs="+", help="one sweep to draw, or two (before, after) to compare"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="page (default: beside the last record, .html; a comparison: compare.html)",
    )
    arguments = parser.parse_args(argv)
    if len(arguments.records) > 2:
        print(f"report: records must be one or two, got {len(arguments.records)}.", file=sys.stderr)
        return 2
    try:
        records = [sweep_record.load(path) for path in arguments.records]
        if len(records) == 1:
            page = (
                arguments.output
                if arguments.output is not None
                else arguments.records[0].with_suffix(".html")
            )
            print(f"page: {write(records[0], page, source=arguments.records[0])}")
            return 0
        rows = report_compare.compare(*records)
        print(report_compare.text(rows))
        page = (
            arguments.output
            if arguments.output is not None
            else arguments.records[1].with_name("compare.html")
        )
        page.write_text(
            report_page.render_comparison(records, arguments.records, rows), encoding="utf-8"
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"page: {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
