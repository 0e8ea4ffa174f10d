"""Two sweeps side by side: which cells got faster, which slower, and which differ by no more than
noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.sweep_tables import table

Row = dict[str, Any]
KEY = ("mode", "variant", "resolution", "frames", "batch", "backend")
VERDICTS = ("slower", "faster", "within noise", "only before", "only after")


def compare(before: Row, after: Row) -> list[Row]:
    """One row per cell of either sweep: slower first, then faster, the largest change first.

    A change counts when the two intervals of the step time do not overlap; `ratio` is after /
    before.
    """
    old = {
        tuple(cell[name] for name in KEY): cell
        for cell in before["cells"]
        if cell["status"] == "ok"
    }
    new = {
        tuple(cell[name] for name in KEY): cell for cell in after["cells"] if cell["status"] == "ok"
    }
    if not set(old) & set(new):
        raise ValueError(
            "report: records must share at least one cell (mode, variant, resolution, frames, "
            "batch, backend), got none."
        )
    rows = []
    for key in dict.fromkeys([*old, *new]):
        row: Row = dict(zip(KEY, key, strict=True))
        first, second = old.get(key), new.get(key)
        row["before_ms"] = first["step_ms"] if first else None
        row["after_ms"] = second["step_ms"] if second else None
        if first is None or second is None:
            row |= {
                "ratio": None,
                "range": None,
                "verdict": "only after" if first is None else "only before",
            }
        else:
            low = second["interval_ms"][0] / first["interval_ms"][1]
            high = second["interval_ms"][1] / first["interval_ms"][0]
            row |= {"ratio": row["after_ms"] / row["before_ms"], "range": [low, high]}
            row["verdict"] = "slower" if low > 1 else "faster" if high < 1 else "within noise"
        rows.append(row)
    return sorted(
        rows, key=lambda row: (VERDICTS.index(row["verdict"]), -abs((row["ratio"] or 1.0) - 1.0))
    )


def counts(rows: Sequence[Row]) -> dict[str, int]:
    return {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}


def text(rows: Sequence[Row], limit: int = 25) -> str:
    head = ", ".join(f"{number} {verdict}" for verdict, number in counts(rows).items() if number)
    changed = [row for row in rows if row["verdict"] in ("slower", "faster")]
    lines = []
    for row in changed[:limit]:
        span = f"[{row['range'][0]:.2f}, {row['range'][1]:.2f}]"
        times = [f"{row['before_ms']:.1f}", f"{row['after_ms']:.1f}", f"{row['ratio']:.2f}", span]
        lines.append(
            [row["verdict"], row["mode"], row["variant"], row["resolution"], row["backend"], *times]
        )
    body = (
        table(
            [
                "verdict",
                "mode",
                "variant",
                "px",
                "backend",
                "before ms",
                "after ms",
                "ratio",
                "range",
            ],
            lines,
        )
        if lines
        else ""
    )
    more = f"\n{len(changed) - limit} more in the page" if len(changed) > limit else ""
    return f"{head}\n{body}{more}"
