"""The sweep's record: one JSON file with the command, the machine, what was measured, and the cells
made from it.

`measured` holds what a clock saw: steps by phase of every (mode, group, backend, resolution), and
objectives alone. `cells` holds one row per variant, put together from those; `assemble` is the only
place that adds or divides times, and can be run again on an old record.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import costmodel, harness
from jepa.atomic import write_text

SCHEMA_VERSION = 1
REFERENCE_BACKEND = "torch"
ANY_VARIANT = "(any)"
Row = dict[str, Any]


def load(path: Path) -> Row:
    content = json.loads(path.read_text())
    if (
        not isinstance(content, dict)
        or content.get("kind") != "sweep"
        or content.get("schema") != SCHEMA_VERSION
    ):
        raise ValueError(
            f"sweep record: {path} must be a sweep of schema {SCHEMA_VERSION}, got something else."
        )
    return content


def save(path: Path, record: Row) -> None:
    """Atomic, so that an interrupted sweep leaves the last whole record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(json.dumps(row, sort_keys=True) for row in value)
            lines.append(f"{json.dumps(key)}: [\n{rows}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}")
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def replace_row(rows: list[Row], row: Row, *names: str) -> None:
    """Puts a row in the place of the one with the same values of `names`, or at the end."""
    for place, old in enumerate(rows):
        if all(old.get(name) == row.get(name) for name in names):
            rows[place] = row
            return
    rows.append(row)


def find(rows: Iterable[Row], **wanted: object) -> Row | None:
    """The first row with these values."""
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None


def _interval(samples: Sequence[float]) -> tuple[float, float]:
    return harness.bootstrap_interval(samples)


def _paired(
    rows: Sequence[float], base: Sequence[float], shift: float = 0.0, base_shift: float = 0.0
) -> tuple[float, list[float]]:
    """Median ratio and its interval over rounds that both sides share."""
    count = min(len(rows), len(base))
    ratios = [(rows[i] + shift) / (base[i] + base_shift) for i in range(count)]
    return statistics.median(ratios), list(_interval(ratios))


def assemble(record: Row) -> list[Row]:
    """Cells of every asked (mode, variant, resolution, backend), from what was measured. Cells that
    could not run keep their reason."""
    settings, measured = record["settings"], record["measured"]
    cells: list[Row] = []
    for mode in settings["modes"]:
        for size in record["sizes"]:
            for variant in (
                settings["variants"]
                if mode in ("pretrain", "finetune+objective")
                else [ANY_VARIANT]
            ):
                for backend in settings["backends"]:
                    key = {
                        "mode": mode,
                        "variant": variant,
                        "resolution": size["resolution"],
                        "backend": backend,
                    }
                    cells.append(
                        key
                        | size
                        | _cell(record, measured, mode, variant, size["resolution"], backend)
                    )
    return cells


def _parts(
    record: Row, measured: Sequence[Row], mode: str, variant: str, resolution: str, backend: str
) -> list[Row] | str:
    """The measured steps whose sum is this cell's step, or why there is none."""
    wanted = []
    if mode in ("pretrain", "finetune+objective"):
        wanted.append(("pretrain", record["groups"][variant]))
    if mode in ("finetune", "finetune+objective"):
        wanted.append(("finetune", None))
    if mode == "frozen":
        wanted.append(("frozen", None))
    found = []
    for kind, group in wanted:
        row = find(measured, kind=kind, group=group, resolution=resolution, backend=backend)
        if row is None:
            skipped = find(record["left_out"], resolution=resolution)
            return "left out: " + skipped["reason"] if skipped else "not measured yet"
        if row["status"] != "ok":
            return row["status"] + ": " + row["reason"]
        found.append(row)
    return found


def _objective(record: Row, variant: str, resolution: str, backend: str) -> Row | None:
    signature = record["signatures"].get(variant)
    if signature is None:
        return None
    return find(
        record["objectives"],
        signature=signature,
        group=record["groups"][variant],
        resolution=resolution,
        backend=backend,
    )


def _cell(
    record: Row, measured: Sequence[Row], mode: str, variant: str, resolution: str, backend: str
) -> Row:
    parts = _parts(record, measured, mode, variant, resolution, backend)
    if isinstance(parts, str):
        status, _, reason = parts.partition(": ")
        return {"status": status, "reason": reason or status}
    has_objective = mode in ("pretrain", "finetune+objective")
    extra = _objective(record, variant, resolution, backend) if has_objective else None
    needs_extra = has_objective and record["signatures"].get(variant) is not None
    if needs_extra and extra is None:
        return {"status": "not measured yet", "reason": "objective not measured yet"}
    if extra is not None and extra["status"] != "ok":
        return {"status": extra["status"], "reason": extra["reason"]}
    added, low, high = (
        (extra["added_s"], *extra["interval_s"]) if extra is not None else (0.0, 0.0, 0.0)
    )
    rounds = [sum(values) for values in zip(*(part["rounds_s"] for part in parts), strict=False)]
    step = statistics.median(rounds) + added
    ends = _interval(rounds)
    phases: dict[str, float] = {}
    for part in parts:
        for name, spent in part["phases_s"].items():
            label = name if len(parts) == 1 or part["kind"] == "pretrain" else f"supervised {name}"
            phases[label] = phases.get(label, 0.0) + spent
    if extra is not None:
        phases["objective"] = phases.get("objective", 0.0) + added
    work = sum(part["flop_linear"] + part["flop_attention"] for part in parts)
    batch, tokens = record["settings"]["batch"], parts[0]["tokens"]
    data = max(part["data_s"] for part in parts)
    cell: Row = {
        "status": "ok",
        "busy": any(row.get("busy", False) for row in (*parts, extra or {})),
        "step_ms": 1e3 * step,
        "interval_ms": [1e3 * (ends[0] + low), 1e3 * (ends[1] + high)],
        "samples": len(rounds),
        "clips_per_s": batch / step,
        "clips_per_s_with_data": batch / (step + data),
        "tokens_per_s": batch * tokens / step,
        "data_ms": 1e3 * data,
        "phases_ms": {name: 1e3 * value for name, value in phases.items()},
        "flop": work,
        "achieved_flops": work / step,
        "peak_share": work / step / record["peak_flops"],
        "peak_bytes": _peak(parts, extra),
        "activation_bytes": None
        if any(part["added_bytes"] is None for part in parts)
        else max(part["added_bytes"] for part in parts),
        "objective_added_ms": 1e3 * added if extra is not None else None,
        "objective_interval_ms": [1e3 * low, 1e3 * high] if extra is not None else None,
    }
    if extra is not None:
        without = step - added
        cell["overhead"] = added / without
        cell["overhead_interval"] = [low / without, high / without]
    if has_objective:
        cell |= _against_baseline(record, measured, mode, resolution, backend, rounds, added)
    if backend != REFERENCE_BACKEND:
        cell |= _against_torch(
            record, measured, mode, variant, resolution, rounds, added, has_objective
        )
    return cell


def _peak(parts: Sequence[Row], extra: Row | None) -> int | None:
    if any(part["peak_bytes"] is None for part in parts):
        return None
    added = (extra or {}).get("added_bytes") or 0
    return max(part["peak_bytes"] for part in parts) + added


def _against_baseline(
    record: Row,
    measured: Sequence[Row],
    mode: str,
    resolution: str,
    backend: str,
    rounds: Sequence[float],
    added: float,
) -> Row:
    """Step time over the baseline variant's, round by round: what the masks, the target and the
    objectives change together."""
    if "baseline" not in record["groups"]:
        return {}
    base = _parts(record, measured, mode, "baseline", resolution, backend)
    if isinstance(base, str):
        return {}
    base_rounds = [
        sum(values) for values in zip(*(part["rounds_s"] for part in base), strict=False)
    ]
    ratio, interval = _paired(rounds, base_rounds, shift=added)
    return {
        "over_baseline": ratio - 1.0,
        "over_baseline_interval": [value - 1.0 for value in interval],
    }


def _against_torch(
    record: Row,
    measured: Sequence[Row],
    mode: str,
    variant: str,
    resolution: str,
    rounds: Sequence[float],
    added: float,
    has_objective: bool,
) -> Row:
    """Speed-up over the fast eager composition, round by round."""
    peer = _parts(record, measured, mode, variant, resolution, REFERENCE_BACKEND)
    if isinstance(peer, str):
        return {}
    extra = _objective(record, variant, resolution, REFERENCE_BACKEND) if has_objective else None
    theirs = [sum(values) for values in zip(*(part["rounds_s"] for part in peer), strict=False)]
    ratio, interval = _paired(
        theirs,
        rounds,
        shift=extra["added_s"] if extra and extra["status"] == "ok" else 0.0,
        base_shift=added,
    )
    return {"speedup": ratio, "speedup_interval": interval}


def fits(cells: Sequence[Row]) -> list[Row]:
    """Cost models of every (mode, variant, backend): the step, each phase, and peak memory, with a
    held-out check and local exponents. Busy cells have no say."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for cell in cells:
        if cell["status"] == "ok" and not cell.get("busy"):
            groups.setdefault((cell["mode"], cell["variant"], cell["backend"]), []).append(cell)
    made = []
    for (mode, variant, backend), rows in groups.items():
        rows.sort(key=lambda row: row["tokens"])
        tokens, batch = (
            [float(row["tokens"]) for row in rows],
            [float(row["batch"]) for row in rows],
        )
        steps = [row["step_ms"] / 1e3 for row in rows]
        check = costmodel.holdout(tokens, batch, steps)
        model = costmodel.fit(tokens, batch, steps)
        phases = {}
        for name in rows[0]["phases_ms"]:
            values = [max(row["phases_ms"].get(name, 0.0) / 1e3, 1e-7) for row in rows]
            phases[name] = costmodel.fit(tokens, batch, values).as_dict()
        memory = None
        if all(row["peak_bytes"] for row in rows):
            memory = costmodel.fit(
                tokens, batch, [float(row["peak_bytes"]) for row in rows]
            ).as_dict()
        made.append(
            {
                "mode": mode,
                "variant": variant,
                "backend": backend,
                "tokens": tokens,
                "batch": batch[0],
                "step": model.as_dict(),
                "phases": phases,
                "memory": memory,
                "exponents": [model.exponent(n, b) for n, b in zip(tokens, batch, strict=True)],
                "slopes": costmodel.slopes(tokens, steps),
                "holdout": None
                if check is None
                else {"tokens": check.tokens, "error": check.error},
            }
        )
    return made


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))
