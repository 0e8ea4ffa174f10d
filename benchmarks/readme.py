"""Fills the generated parts of README.md and of the pages under docs from the code and from the
committed records.

python -m benchmarks.readme            writes them
python -m benchmarks.readme --check    exits 1 when a page differs from what the code and the
records say

A part is a block `<!-- generated: NAME [ARGUMENT] -->` ... `<!-- end -->`; PARTS says who writes
it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import efficiency_page, report_text
from jepa_kernels.support import table as support_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- generated: (\w+)(?: (\S+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
KEYS = ("backend", "baseline", "case", "dtype", "pass")

# What README shows of each op: case, pass and baseline. Everything else, losses included, is in
# docs/measured.md.
HEADLINES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "masked_attention": (
        ("vit_b/224px/16f/dense", "forward", "sdpa"),
        ("vit_b/224px/16f/dense", "forward+backward", "sdpa"),
        ("vit_b/224px/16f/dense", "forward+backward", "rotation_sdpa"),
        ("vit_b/112px/16f/dense", "forward+backward", "rotation_sdpa"),
        ("vit_b/224px/16f/ragged", "forward+backward", "padded_sdpa"),
    ),
    "ema_update": (
        ("vit_b/float32", "update", "mul_add"),
        ("vit_b/float32", "update", "foreach_lerp"),
        ("vit_b/float32", "update", "stream"),
        ("micro/float32", "update", "foreach_lerp"),
    ),
    "adamw_ema": (
        ("vit_b", "step", "adamw_default"),
        ("vit_b", "step", "adamw_fused"),
        ("vit_b", "step", "stream"),
    ),
    "latent_rollout": (
        ("residual_mlp/last/D3072/K16/2048rows", "forward+backward", "state_space"),
        ("residual_mlp/loss/D1536/K4/2048rows", "forward+backward", "state_space"),
        ("residual_mlp/last/D768/K1/2048rows", "forward+backward", "state_space"),
        ("gru/last/D256/K16/1024rows", "forward+backward", "nn_gru_layer_norm"),
        ("published/ld/D3072/112px/16f", "forward+backward", "eager_dense_grid"),
    ),
    "integrations": (
        ("transformers-vjepa2/encoder/vit_s/224px/16f", "forward+backward", "transformers-vjepa2"),
        ("vjepa2/attention/vit_s/224px/16f", "forward+backward", "vjepa2"),
        ("transformers-ijepa/encoder/vit_s/112px/16f", "forward+backward", "transformers-ijepa"),
    ),
    "step": (
        ("tiny/112px/16f", "step", "published"),
        ("tiny/224px/16f", "step", "published"),
        ("tiny/224px/16f", "step", "published, checkpointing"),
    ),
}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def newest(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The latest record of every comparison in a file's content, in the order of their first
    appearance."""
    latest: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in content["records"]:
        latest[tuple(record[k] for k in KEYS)] = record
    return list(latest.values())


def devices() -> list[Path]:
    return sorted(p for p in RESULTS.iterdir() if p.is_dir())


def ratio(record: dict[str, Any]) -> str:
    """The paired ratio with its interval; below 1 is a loss and says so."""
    if record["status"] != "ok":
        return str(record["status"])
    low, high = record["interval"]
    mark = "" if low >= 1 else " (loss)" if high < 1 else " (even)"
    return f"{record['ratio']:.2f} [{low:.2f}, {high:.2f}]{mark}"


def how(record: dict[str, Any]) -> str:
    """Threads and clock of a measurement."""
    return f"{record['threads']}, {record.get('clock', 'wall')}"


def pictures(paths: Iterable[Path]) -> list[str]:
    return [f"![{path.stem.replace('_', ' ')}]({path.relative_to(ROOT)})" for path in paths]


def _row(record: dict[str, Any]) -> str:
    names = ("case", "dtype", "pass", "baseline", "backend")
    cells = [*(record[name] for name in names), how(record)]
    return f"| {' | '.join(cells)} | {ratio(record)} |"


def measured(_: str | None) -> str:
    """A table per device and op: our speed over each baseline's, with the interval."""
    lines: list[str] = []
    for device in devices():
        for path in sorted(device.glob("*.json")):
            content = read(path)
            if not all("baseline" in r for r in content.get("records", [{}])):
                continue
            records = newest(content)
            load = max(r.get("load_average") or 0.0 for r in records)
            lines += [
                "",
                f"## `{path.stem}` on {records[0]['device']} ({device.name})",
                "",
                f"Load average up to {load:.0f}; record: `{path.relative_to(ROOT)}`",
                "",
                "| case | dtype | pass | baseline | ours | threads, clock | baseline's time / "
                "ours |",
                "|---|---|---|---|---|---|---|",
                *map(_row, records),
            ]
    return "\n".join(lines).strip() or "No record is committed yet."


def headlines(_: str | None) -> str:
    """A few rows per op, a column for each device and dtype."""
    found: dict[tuple[str, str], dict[tuple[str, str, str, str], dict[str, Any]]] = {}
    for device in devices():
        for op in HEADLINES:
            path = device / f"{op}.json"
            # A case that was run on several backends is shown for kernels: `torch` comes first, to
            # be overwritten.
            for record in (
                sorted(newest(read(path)), key=lambda r: r["backend"] != "torch")
                if path.exists()
                else []
            ):
                key = (op, record["case"], record["pass"], record["baseline"])
                found.setdefault((device.name, record["dtype"]), {})[key] = record
    wanted = [(op, *row) for op, rows in HEADLINES.items() for row in rows]
    columns = {at: rows for at, rows in found.items() if any(key in rows for key in wanted)}
    if not columns:
        return "No record is committed yet."
    heads = [f"{device}, {dtype}" for device, dtype in columns]
    lines = [
        f"| op | case | pass | against | {' | '.join(heads)} |",
        f"|{'---|' * (4 + len(heads))}",
    ]
    for key in wanted:
        records = [rows.get(key) for rows in columns.values()]
        cells = ["" if record is None else ratio(record) + _unusual(record) for record in records]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines)


def _unusual(record: dict[str, Any]) -> str:
    """How a row was measured where that is not two threads in wall time."""
    return (
        ""
        if how(record) == "2, wall"
        else f" ({record['threads']} thread, {record.get('clock', 'wall')} time)"
    )


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
    for device in devices():
        path = device / "integrations.json"
        records = (
            [r for r in newest(read(path)) if r["baseline"] == name and r["status"] == "ok"]
            if path.exists()
            else []
        )
        if not records:
            continue
        measured_with = sorted(
            {f"{r['threads']} thread{'s' * (r['threads'] > 1)}, {r['clock']} time" for r in records}
        )
        lines += [
            "",
            f"{records[0]['device']} ({device.name}), torch {records[0]['torch']}, "
            f"{'; '.join(measured_with)}; record: `{path.relative_to(ROOT)}`",
            "",
            "| what | size | pixels, tokens | dtype | pass | untouched ms | accelerated ms | "
            "ratio of times | peak MiB, untouched, accelerated |",
            "|---|---|---|---|---|---|---|---|---|",
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
                part,
                width,
                f"{details['resolution']}, {details['tokens']}",
                record["dtype"],
                record["pass"],
                *times,
                ratio(record),
            ]
            lines.append(f"| {' | '.join(cells)} | {memory} |")
    return "\n".join(lines).strip() or "No record is committed yet."


PARTS: dict[str, Callable[[str | None], str]] = {
    "support": lambda _: support_table(),
    "measured": measured,
    "headlines": headlines,
    "findings": findings,
    "sweep": sweep,
    "sample_efficiency": sample_efficiency,
    "integration": integration,
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, folder: Path) -> str:
    """The text of a page in `folder`, with every generated block made anew; its links lead from
    there."""
    up = "../" * len(folder.relative_to(ROOT).parts)

    def made(match: re.Match[str]) -> str:
        part = PARTS[match[2]](match[3]).replace("](benchmarks/", f"]({up}benchmarks/")
        return f"{match[1]}{part}\n{match[5]}"

    return BLOCK.sub(made, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = filled(before, path.parent)
        if before != after:
            stale.append(path)
            if not check:
                path.write_text(after, encoding="utf-8")
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
