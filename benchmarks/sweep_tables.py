"""The sweep's tables for a terminal, and the planner's answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import costmodel, sweep_record
from benchmarks.resolutions import Resolution

Row = dict[str, Any]


def _ok(record: Row, **wanted: object) -> list[Row]:
    return [
        cell
        for cell in record["cells"]
        if cell["status"] == "ok" and all(cell[name] == value for name, value in wanted.items())
    ]


def ours(record: Row) -> str:
    """The backend the tables speak of: the first that is not the yardstick."""
    backends = record["settings"]["backends"]
    return next((name for name in backends if name != sweep_record.REFERENCE_BACKEND), backends[0])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = []
    for line in [header, *rows]:
        lines.append(
            "  ".join(
                text.ljust(width) if i == 0 else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            )
        )
    return "\n".join(lines)


def resolution_line(record: Row, resolution: str) -> str:
    backend = ours(record)
    baseline = _ok(
        record,
        mode="pretrain",
        variant=record["settings"]["variants"][0],
        resolution=resolution,
        backend=backend,
    )
    spent = record["spent_s"].get(resolution, 0.0)
    if not baseline:
        return f"{resolution:>8} px: done in {spent:.0f} s"
    cell = baseline[0]
    gain = f", {cell['speedup']:.2f}x over torch" if "speedup" in cell else ""
    return (
        f"{resolution:>8} px: {cell['variant']} {cell['step_ms']:.1f} ms per step, "
        f"{cell['clips_per_s']:.2f} clips/s on {backend}{gain} "
        f"({spent:.0f} s)" + ("  BUSY: other programs had the cores" if cell.get("busy") else "")
    )


def throughput(record: Row, mode: str) -> str:
    """Clips per second of every variant at every resolution, with the exponent at the largest."""
    backend, sizes = ours(record), [row["resolution"] for row in record["sizes"]]
    header = ["variant", *[f"{size} px" for size in sizes], "exponent", "x torch"]
    rows = []
    names = (
        record["settings"]["variants"]
        if mode in ("pretrain", "finetune+objective")
        else [sweep_record.ANY_VARIANT]
    )
    for name in names:
        found = {
            cell["resolution"]: cell
            for cell in record["cells"]
            if (cell["mode"], cell["variant"], cell["backend"]) == (mode, name, backend)
        }
        line = [name]
        for size in sizes:
            cell = found.get(size)
            line.append(
                "-"
                if cell is None
                else f"{cell['clips_per_s']:.2f}" + (" busy" if cell.get("busy") else "")
                if cell["status"] == "ok"
                else cell["status"]
            )
        model = sweep_record.find(record["fits"], mode=mode, variant=name, backend=backend)
        line.append(f"{model['exponents'][-1]:.2f}" if model else "-")
        last = found.get(sizes[-1]) if sizes else None
        told = last is not None and last.get("speedup") and not last.get("busy")
        line.append(f"{last['speedup']:.2f}" if told else "-")
        rows.append(line)
    return f"clips/s, {mode}, backend {backend}\n" + table(header, rows)


def interval(low: float, high: float) -> str:
    """An interval for a table; one round gives one value and none."""
    return f"[{low:.2f}, {high:.2f}]" if high > low else "one round"


def overheads(record: Row) -> str:
    """What objectives add to a step, the worst first, at the largest resolution."""
    backend = ours(record)
    size = record["sizes"][-1]["resolution"]
    cells = [
        cell
        for cell in _ok(record, mode="pretrain", resolution=size, backend=backend)
        if cell.get("overhead") is not None
    ]
    cells.sort(key=lambda cell: -cell["overhead"])
    rows = [
        [
            cell["variant"],
            f"{cell['objective_added_ms']:.2f}",
            interval(*cell["objective_interval_ms"]),
            f"{100 * cell['overhead']:.1f} %" + (" busy" if cell.get("busy") else ""),
        ]
        for cell in cells
    ]
    return f"cost of the objectives at {size} px, backend {backend}\n" + table(
        ["variant", "added ms", "interval", "of the step"], rows
    )


def busy_note(record: Row) -> str | None:
    """How many cells other programs spoiled; None where none."""
    cells = _ok(record)
    busy = sum(bool(cell.get("busy")) for cell in cells)
    if not busy:
        return None
    return (
        f"busy: in {busy} of {len(cells)} cells other programs had the cores while they were "
        "measured; their times say nothing, and no sentence or cost model uses them"
    )


def summary(record: Row) -> str:
    if not record["sizes"]:
        return "sweep: nothing was measured; " + "; ".join(
            f"{row['resolution']} px: {row['reason']}" for row in record["left_out"]
        )
    parts = []
    modes = [
        mode for mode in record["settings"]["modes"] if mode in ("pretrain", "finetune", "frozen")
    ]
    if "pretrain" in modes:
        parts += [throughput(record, "pretrain"), overheads(record)]
    parts += [throughput(record, mode) for mode in modes if mode != "pretrain"]
    for row in record["left_out"]:
        parts.append(f"left out: {row['resolution']} px, {row['reason']}")
    note = busy_note(record)
    if note is not None:
        parts.append(note)
    return "\n\n".join(["", *parts, ""])


def prediction(record: Row, size: Resolution, frames: int, batch: int, source: Path) -> str:
    """Expected step time and memory of every mode (and variant) at a size that was not measured.

    Raises:
        ValueError: every cell was measured while other programs had the cores.
    """
    if not record["fits"]:
        raise ValueError(
            "sweep: record must have cells that had the cores to themselves, got busy ones only."
        )
    model_tokens = size.tokens(frames)
    measured = max(row["tokens"] for row in record["sizes"])
    backend = ours(record)
    header = ["mode", "variant", "step", "clips/s", "memory", "exponent"]
    rows = []
    for made in record["fits"]:
        if made["backend"] != backend:
            continue
        step = _fit(made["step"])
        seconds = step.predict(model_tokens, batch)
        memory = (
            "-"
            if made["memory"] is None
            else f"{_fit(made['memory']).predict(model_tokens, batch) / 2**30:.2f} GB"
        )
        rows.append(
            [
                made["mode"],
                made["variant"],
                f"{seconds:.3f} s",
                f"{batch / seconds:.2f}",
                memory,
                f"{step.exponent(model_tokens, batch):.2f}",
            ]
        )
    checks = [
        made["holdout"]
        for made in record["fits"]
        if made["holdout"] is not None and made["backend"] == backend
    ]
    errors = sorted(abs(check["error"]) for check in checks)
    lines = [
        f"{size.name} px, {frames} frames, batch {batch}: {model_tokens} tokens per clip, "
        f"{record['settings']['size']}, "
        f"{record['settings']['dtype']}, backend {backend}, on {record['machine']['device_key']}",
        f"from {source} (largest measured: {measured} tokens; this is "
        f"{model_tokens / measured:.1f} times that)",
    ]
    if errors:
        worst, middle = 100 * errors[-1], 100 * errors[len(errors) // 2]
        lines.append(
            f"held-out check: the largest measured size was predicted within {worst:.0f} % "
            f"(worst), {middle:.0f} % (median)"
        )
    return "\n".join([*lines, table(header, rows)])


def _fit(values: Row) -> costmodel.Fit:
    return costmodel.Fit(
        values["constant"],
        values["per_token"],
        values["per_pair"],
        values["points"],
        values["worst_error"],
    )
