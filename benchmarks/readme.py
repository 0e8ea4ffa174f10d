"""Fills the generated parts of README.md from the code (support table) and from the committed records (measured ratios).

python -m benchmarks.readme            writes them
python -m benchmarks.readme --check    exits 1 when README.md differs from what the code and the records say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jepa_kernels.support import table as support_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def newest(path: Path) -> list[dict[str, Any]]:
    """The latest record of every comparison in a file, in the order of their first appearance."""
    latest: dict[tuple, dict[str, Any]] = {}
    for record in json.loads(path.read_text(encoding="utf-8"))["records"]:
        latest[tuple(record[k] for k in ("backend", "baseline", "case", "dtype", "pass"))] = record
    return list(latest.values())


def _row(record: dict[str, Any]) -> str:
    names = ("case", "dtype", "pass", "baseline", "backend")
    cells = [*(record[name] for name in names), f"{record['threads']}, {record.get('clock', 'wall')}"]
    if record["status"] != "ok":
        return f"| {' | '.join(cells)} | {record['status']} |"
    low, high = record["interval"]
    mark = "" if low >= 1 else " (loss)" if high < 1 else " (even)"
    return f"| {' | '.join(cells)} | {record['ratio']:.2f} [{low:.2f}, {high:.2f}]{mark} |"


def measured() -> str:
    """A table per device and op: our speed over each baseline's, with the interval; below 1 is a loss and says so."""
    lines: list[str] = []
    for device in sorted(p for p in RESULTS.iterdir() if p.is_dir()):
        for op in ("masked_attention", "ema_update", "adamw_ema", "latent_rollout"):
            path = device / f"{op}.json"
            if not path.exists():
                continue
            records = newest(path)
            load = max(r.get("load_average") or 0.0 for r in records)
            lines += [
                "",
                f"`{op}` on {records[0]['device']} ({device.name}, load average up to {load:.0f}); record: `{path.relative_to(ROOT)}`",
                "",
                "| case | dtype | pass | baseline | ours | threads, clock | baseline's time / ours |",
                "|---|---|---|---|---|---|---|",
                *map(_row, records),
            ]
    return "\n".join(lines).strip() or "No record is committed yet."


PARTS: dict[str, Callable[[], str]] = {"support": support_table, "measured": measured}


def filled(text: str) -> str:
    """README's text with every generated block made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[4]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if check and before != after:
        print("README.md differs from the code or the records; run: python -m benchmarks.readme", file=sys.stderr)
        return 1
    if not check:
        path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
