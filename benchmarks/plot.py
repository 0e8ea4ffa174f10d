"""Figures from benchmark records: the ratio against frame resolution, with its interval and the
line at 1.

    python -m benchmarks.plot RECORDS.json --output figure.svg
    python -m benchmarks.plot RECORDS.json --pass forward --dtype float32 --x tokens

Colours are Okabe and Ito's (safe for the common kinds of colour blindness); markers differ as well,
so a figure also works in grey.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#222222"


def style(axes: Any) -> None:
    """One look for every figure: light grid behind, no box."""
    axes.set_axisbelow(True)
    axes.grid(True, which="major", color="#d9d9d9", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def series_of(record: dict[str, Any], shared: set[str]) -> str:
    """Legend entry: what differs between the lines of one figure."""
    group = record["details"].get("group", "")
    parts = [str(group)] if group else []
    for name in ("backend", "dtype", "pass"):
        if name not in shared:
            parts.append(str(record[name]))
    parts.append(f"against {record['baseline']}")
    return ", ".join(parts)


def _axis_value(record: dict[str, Any], x: str) -> float | None:
    value = record["details"].get(x)
    if x == "resolution" and isinstance(value, str):
        height, _, width = value.partition("x")
        return float(height) if not width else (float(height) * float(width)) ** 0.5
    return None if value is None else float(value)


def ratio_figure(
    records: Sequence[dict[str, Any]], *, x: str = "resolution", title: str | None = None
) -> Any:
    """A matplotlib figure of `ratio` against `details[x]`; needs records with status "ok"."""
    from matplotlib.figure import Figure

    usable = [row for row in records if row["status"] == "ok" and _axis_value(row, x) is not None]
    if not usable:
        raise ValueError(
            f"plot: records must contain at least one finished case with details[{x!r}], got none."
        )
    shared = {
        name for name in ("backend", "dtype", "pass") if len({row[name] for row in usable}) == 1
    }
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in usable:
        lines.setdefault(series_of(row, shared), []).append(row)
    figure = Figure(figsize=(7.2, 4.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    style(axes)
    axes.axhline(1.0, color=INK, linewidth=1.0)
    for number, (name, rows) in enumerate(sorted(lines.items())):
        rows.sort(key=lambda row: _axis_value(row, x) or 0.0)
        positions = [_axis_value(row, x) for row in rows]
        middle = [row["ratio"] for row in rows]
        low = [row["interval"][0] for row in rows]
        high = [row["interval"][1] for row in rows]
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        axes.fill_between(positions, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(
            positions, middle, color=color, marker=marker, markersize=5, linewidth=1.6, label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = sorted({_axis_value(row, x) for row in usable})
    tokens = {_axis_value(row, x): row["details"].get("tokens") for row in usable}
    labels = [
        f"{tick:g}" + (f"\n{tokens[tick]} tokens" if x == "resolution" and tokens[tick] else "")
        for tick in ticks
    ]
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.set_xticks([], minor=True)
    low_limit, high_limit = axes.get_ylim()
    marks = [
        value
        for value in (0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.7, 8, 16, 32, 64)
        if low_limit <= value <= high_limit
    ]
    axes.set_yticks(marks, [f"{value:g}x" for value in marks])
    axes.set_yticks([], minor=True)
    axes.set_xlabel({"resolution": "frame resolution [px]", "tokens": "tokens"}.get(x, x))
    axes.set_ylabel("speed-up (baseline time / our time)")
    first = usable[0]
    constant = ", ".join(
        str(first[name]) for name in ("backend", "dtype", "pass") if name in shared
    )
    axes.set_title(
        title or f"{first['op']}: {constant} on {first['device_key']}",
        fontsize=10,
        loc="left",
        color=INK,
    )
    axes.legend(fontsize=8, frameon=False, loc="best")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "records",
        type=Path,
        nargs="+",
        help="record files; the newest record of each case is drawn",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="figure file, .svg or .png (default: beside the first record file, .svg)",
    )
    parser.add_argument(
        "--x",
        default="resolution",
        help="field of `details` for the horizontal axis: resolution (default) or tokens",
    )
    for name in ("backend", "baseline", "dtype", "pass", "case"):
        parser.add_argument(f"--{name}", help=f"draw only records whose {name} contains this text")
    parser.add_argument("--title")
    arguments = vars(parser.parse_args(argv))
    rows = harness.latest(
        row for path in arguments["records"] for row in harness.load_records(path)
    )
    for name in ("backend", "baseline", "dtype", "pass", "case"):
        if arguments[name] is not None:
            exact = name in ("pass", "backend")
            rows = [
                row
                for row in rows
                if (arguments[name] == row[name] if exact else arguments[name] in str(row[name]))
            ]
    output = arguments["output"] or arguments["records"][0].with_suffix(".svg")
    ratio_figure(rows, x=arguments["x"], title=arguments["title"]).savefig(output)
    print(f"figure: {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
