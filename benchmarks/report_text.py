"""The report's sentences: what the sweep says about the question, computed from its cells and never
written by hand."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import sweep_record, sweep_tables

Row = dict[str, Any]


def _at(record: Row, mode: str, variant: str, resolution: str) -> Row | None:
    """A cell to speak of: one that ran, with the cores to itself."""
    cell = sweep_record.find(
        record["cells"],
        mode=mode,
        variant=variant,
        resolution=resolution,
        backend=sweep_tables.ours(record),
    )
    return None if cell is None or cell["status"] != "ok" or cell.get("busy") else cell


def _rate(value: float) -> str:
    return f"{value:.3g}"


def _pretraining(record: Row) -> str | None:
    sizes = record["sizes"]
    first = record["settings"]["variants"][0]
    small, large = (
        _at(record, "pretrain", first, row["resolution"]) for row in (sizes[0], sizes[-1])
    )
    if small is None or large is None:
        return None
    if len(sizes) == 1:
        rate = _rate(small["clips_per_s"])
        return (
            f"At {small['resolution']} px pre-training ({first}) runs at {rate} clips/s; one "
            "resolution tells nothing of scaling."
        )
    made = sweep_record.find(
        record["fits"], mode="pretrain", variant=first, backend=sweep_tables.ours(record)
    )
    sentence = (
        f"From {small['resolution']} to {large['resolution']} px a clip has "
        f"{large['tokens'] / small['tokens']:.1f} times the tokens, and "
        f"pre-training ({first}) falls from {_rate(small['clips_per_s'])} to "
        f"{_rate(large['clips_per_s'])} clips/s, "
        f"{small['clips_per_s'] / large['clips_per_s']:.1f} times fewer"
    )
    if made is not None:
        sentence += (
            f": step time grows as tokens to the power {made['exponents'][0]:.2f} at "
            f"{small['resolution']} px "
            f"and {made['exponents'][-1]:.2f} at {large['resolution']} px"
        )
        if made["holdout"] is not None:
            sentence += (
                " (the model predicts the largest size from the smaller ones within "
                f"{100 * abs(made['holdout']['error']):.0f} %)"
            )
    return sentence + "."


def _objectives(record: Row) -> str | None:
    size = record["sizes"][-1]["resolution"]
    cells = [
        c
        for name in record["settings"]["variants"]
        if (c := _at(record, "pretrain", name, size)) and c.get("overhead") is not None
    ]
    if not cells:
        return None
    cells.sort(key=lambda cell: cell["overhead"])
    worst = cells[-1]
    middle = statistics.median(cell["overhead"] for cell in cells)
    sentence = (
        f"At {size} px the objectives add {100 * middle:.1f} % to a step in the median of "
        f"{len(cells)} variants and "
        f"{100 * worst['overhead']:.1f} % at most ({worst['variant']})"
    )
    cheap = sum(cell["overhead"] <= 0.03 for cell in cells)
    sentence += f"; {cheap} of them stay within 3 %"
    slow = [
        c
        for name in record["settings"]["variants"]
        if (c := _at(record, "pretrain", name, size)) and c.get("over_baseline") is not None
    ]
    if slow:
        slowest = max(slow, key=lambda cell: cell["over_baseline"])
        fastest = min(slow, key=lambda cell: cell["over_baseline"])
        high, low = 100 * slowest["over_baseline"], 100 * fastest["over_baseline"]
        sentence += (
            f". Counting masks and target too, the slowest variant is {slowest['variant']} "
            f"({high:+.0f} % step time against the baseline) "
            f"and the fastest {fastest['variant']} ({low:+.0f} %)"
        )
    return sentence + "."


def _finetuning(record: Row) -> str | None:
    sizes = record["sizes"]
    ends = [
        _at(record, "finetune", sweep_record.ANY_VARIANT, row["resolution"])
        for row in (sizes[0], sizes[-1])
    ]
    if ends[0] is None or ends[1] is None:
        return None
    made = sweep_record.find(
        record["fits"],
        mode="finetune",
        variant=sweep_record.ANY_VARIANT,
        backend=sweep_tables.ours(record),
    )
    sentence = (
        "Fine-tuning costs the same for every variant, since only the encoder remains: "
        f"{_rate(ends[0]['clips_per_s'])} clips/s at "
        f"{ends[0]['resolution']} px"
    )
    if len(sizes) > 1:
        power = f", exponent {made['exponents'][-1]:.2f}" if made is not None else ""
        sentence += f" and {_rate(ends[1]['clips_per_s'])} at {ends[1]['resolution']} px{power}"
    frozen = _at(record, "frozen", sweep_record.ANY_VARIANT, sizes[-1]["resolution"])
    if frozen is not None:
        sentence += f"; with frozen features {_rate(frozen['clips_per_s'])} clips/s"
    return sentence + "."


def _kernels(record: Row) -> str | None:
    parts = []
    first = record["settings"]["variants"][0]
    for row in record["sizes"]:
        cell = _at(record, "pretrain", first, row["resolution"])
        if cell is not None and cell.get("speedup"):
            interval = sweep_tables.interval(*cell["speedup_interval"])
            parts.append(f"{cell['speedup']:.2f}x at {row['resolution']} px, {interval}")
    if not parts:
        return None
    return (
        f"Speed-up of backend {sweep_tables.ours(record)} over torch for a whole {first} step: "
        f"{'; '.join(parts)}."
    )


def _caution(record: Row) -> str | None:
    if record["settings"].get("clock") == "cpu":
        return (
            "Times are CPU time of one thread, because this machine was shared; two threads on "
            "an idle machine take less."
        )
    note = sweep_tables.busy_note(record)
    if note is not None:
        return note[0].upper() + note[1:] + "."
    load, cores = record["machine"].get("load_average"), record["machine"].get("cores")
    if load is not None and cores and load > 1.5 * cores:
        busy = f"This machine was busy when the sweep began (load {load:.1f} on {cores} cores)"
        return f"{busy}: ratios are paired, absolute times are inflated."
    return None


def findings(record: Row) -> list[str]:
    """What the page says first, in order; sentences without data are left out."""
    made = [
        _pretraining(record),
        _objectives(record),
        _finetuning(record),
        _kernels(record),
        _caution(record),
    ]
    return [sentence for sentence in made if sentence is not None]
