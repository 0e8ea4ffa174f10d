"""The report's figures, drawn once with matplotlib and used twice: as files, and inline in the page
where CSS gives them its colours.

Lines differ in colour (Okabe and Ito's palette), marker and place, never in colour alone. Every
figure exists wide and narrow, so that a phone shows text in a readable size.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from benchmarks import costmodel, sweep_record, sweep_tables
from benchmarks.plot import INK, MARKERS, PALETTE, style
from benchmarks.resolutions import TUBELET_SIZE
from jepa.step import STEP_PHASES

MUTED = "#8a8a8a"
GRID = "#d9d9d9"
PHASE_COLOURS = {
    "data": "#8a8a8a",
    "target": "#0072B2",
    "encoder": "#0072B2",
    "context": "#56B4E9",
    "predictor": "#009E73",
    "head": "#009E73",
    "objective": "#E69F00",
    "backward": "#D55E00",
    "optimiser": "#CC79A7",
}
PHASE_HATCHES = {"data": "///"}
THEME = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    "#ffffff": "var(--paper)",
} | {colour: f"var(--c{number})" for number, colour in enumerate(PALETTE) if colour != "#000000"}
Row = dict[str, Any]


def canvas(
    narrow: bool, height: float = 4.4, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    figure = Figure(
        figsize=(4.3 if narrow else 7.6, height), dpi=140, layout="constrained", facecolor="#ffffff"
    )
    axes = figure.subplots(rows, columns, **options)
    for one in figure.axes:
        style(one)
        for label in (one.xaxis.label, one.yaxis.label):
            label.set_color(INK)
        for spine in one.spines.values():
            spine.set_color(MUTED)
        one.set_facecolor("none")
        one.tick_params(labelsize=8)
    return figure, axes


def compact(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def pixel_axis(axes: Any, sizes: Sequence[Row]) -> None:
    """Resolution on a log axis, with the tokens it costs."""
    places = [side(row) for row in sizes]
    axes.set_xscale("log")
    labels = [f"{row['resolution']}\n{row['tokens']}" for row in sizes]
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(
            lambda value, _: labels[min(range(len(places)), key=lambda i: abs(places[i] - value))]
        )
    )
    axes.set_xlabel("frame resolution [px], tokens per clip below it", fontsize=9)


def side(row: Row) -> float:
    """Pixels of the square with the same area."""
    return float(row["pixels"]) ** 0.5


def log_values(axes: Any, unit: str = "") -> None:
    """A log y axis with plain numbers at 1, 2, 5."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    places = [base * 10.0**power for power in range(-6, 9) for base in (1, 2, 5)]
    kept = [place for place in places if low <= place <= high]
    axes.yaxis.set_major_locator(FixedLocator(kept))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value) + unit))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend(axes: Any, narrow: bool, **options: Any) -> None:
    """Inside the axes where there is room, below them on a narrow figure."""
    if narrow:
        longest = max((len(label) for label in axes.get_legend_handles_labels()[1]), default=0)
        options = {
            "loc": "upper center",
            "bbox_to_anchor": (0.45, -0.2),
            "ncols": 1 if longest > 18 else 2,
            "columnspacing": 1.0,
        }
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK, **options)


def series(record: Row, mode: str, variant: str, backend: str) -> list[Row]:
    rows = [
        c
        for c in record["cells"]
        if c["status"] == "ok"
        and (c["mode"], c["variant"], c["backend"]) == (mode, variant, backend)
    ]
    return sorted(rows, key=lambda cell: cell["tokens"])


def exponent(record: Row, mode: str, variant: str, backend: str) -> float | None:
    made = sweep_record.find(record["fits"], mode=mode, variant=variant, backend=backend)
    return made["exponents"][-1] if made and len(made["tokens"]) > 1 else None


def highlighted(record: Row, backend: str, count: int = 6) -> list[str]:
    """The variants a crowded figure names: the baseline, the fastest, and the slowest ones,
    skipping any that would lie on a named line."""
    size = record["sizes"][-1]["resolution"]
    wanted = ("pretrain", backend, size)
    last = {
        c["variant"]: c
        for c in record["cells"]
        if c["status"] == "ok" and (c["mode"], c["backend"], c["resolution"]) == wanted
    }
    if not last:
        return record["settings"]["variants"][:count]
    slowest = sorted(last, key=lambda name: -last[name]["step_ms"])
    chosen = [name for name in ("baseline",) if name in last]
    for name in [*slowest[: count - 2], slowest[-1], *slowest]:
        gaps = [abs(last[name]["step_ms"] / last[other]["step_ms"] - 1) for other in chosen]
        if len(chosen) < count and min(gaps, default=1.0) > 0.02:
            chosen.append(name)
    return chosen


def throughput(record: Row, narrow: bool = False) -> Figure:
    """Clips per second of every variant against resolution; the outstanding ones named, the others
    grey."""
    backend = sweep_tables.ours(record)
    figure, axes = canvas(narrow, 5.6 if narrow else 4.6)
    names = record["settings"]["variants"]
    chosen = highlighted(record, backend)
    quiet = [name for name in names if name not in chosen]
    exponents = [
        value
        for value in (exponent(record, "pretrain", name, backend) for name in quiet)
        if value is not None
    ]
    for number, name in enumerate(quiet):
        rows = series(record, "pretrain", name, backend)
        label = None
        if number == 0:
            spread = (
                f" (exponents {min(exponents):.2f} to {max(exponents):.2f})" if exponents else ""
            )
            label = f"{len(quiet)} other variants{spread}"
        axes.plot(
            [side(r) for r in rows],
            [r["clips_per_s"] for r in rows],
            color=MUTED,
            linewidth=0.8,
            alpha=0.7,
            label=label,
        )
    for number, name in enumerate(chosen):
        rows = series(record, "pretrain", name, backend)
        if not rows:
            continue
        power = exponent(record, "pretrain", name, backend)
        label = name if power is None else f"{name} (exponent {power:.2f})"
        places = [side(r) for r in rows]
        low = [1e3 * r["batch"] / r["interval_ms"][1] for r in rows]
        high = [1e3 * r["batch"] / r["interval_ms"][0] for r in rows]
        axes.fill_between(places, low, high, color=PALETTE[number], alpha=0.18, linewidth=0)
        axes.plot(
            places,
            [r["clips_per_s"] for r in rows],
            color=PALETTE[number],
            marker=MARKERS[number],
            markersize=5,
            linewidth=1.7,
            label=label,
        )
    pixel_axis(axes, record["sizes"])
    log_values(axes)
    axes.set_ylabel("clips per second", fontsize=9)
    legend(axes, narrow, loc="upper right")
    return figure


def modes(record: Row, narrow: bool = False) -> Figure:
    """Pre-training, fine-tuning and frozen features against resolution."""
    backend = sweep_tables.ours(record)
    figure, axes = canvas(narrow, 5.0 if narrow else 4.2)
    first = record["settings"]["variants"][0]
    for number, mode in enumerate(record["settings"]["modes"]):
        variant = first if mode in ("pretrain", "finetune+objective") else sweep_record.ANY_VARIANT
        rows = series(record, mode, variant, backend)
        if not rows:
            continue
        power = exponent(record, mode, variant, backend)
        names = {
            "pretrain": f"pre-training ({first})",
            "finetune": "fine-tuning",
            "frozen": "frozen features",
        }
        name = names.get(mode, f"fine-tuning + objective ({first})")
        label = name if power is None else f"{name} (exponent {power:.2f})"
        places = [side(r) for r in rows]
        low = [1e3 * r["batch"] / r["interval_ms"][1] for r in rows]
        high = [1e3 * r["batch"] / r["interval_ms"][0] for r in rows]
        axes.fill_between(places, low, high, color=PALETTE[number], alpha=0.18, linewidth=0)
        axes.plot(
            places,
            [r["clips_per_s"] for r in rows],
            color=PALETTE[number],
            marker=MARKERS[number],
            markersize=5,
            linewidth=1.7,
            label=label,
        )
    pixel_axis(axes, record["sizes"])
    log_values(axes)
    axes.set_ylabel("clips per second", fontsize=9)
    legend(axes, narrow, loc="lower left")
    return figure


def speedup(record: Row, narrow: bool = False) -> Figure:
    """Step time of the torch backend over ours, with the line at 1."""
    backend = sweep_tables.ours(record)
    figure, axes = canvas(narrow, 5.0 if narrow else 4.2)
    lines = [("pretrain", name, name) for name in highlighted(record, backend, 4)]
    lines += [
        ("finetune", sweep_record.ANY_VARIANT, "fine-tuning"),
        ("frozen", sweep_record.ANY_VARIANT, "frozen features"),
    ]
    axes.axhline(1.0, color=INK, linewidth=1.1)
    for number, (mode, variant, label) in enumerate(lines):
        rows = [row for row in series(record, mode, variant, backend) if row.get("speedup")]
        if not rows:
            continue
        places = [side(r) for r in rows]
        axes.fill_between(
            places,
            [r["speedup_interval"][0] for r in rows],
            [r["speedup_interval"][1] for r in rows],
            color=PALETTE[number],
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            places,
            [r["speedup"] for r in rows],
            color=PALETTE[number],
            marker=MARKERS[number],
            markersize=5,
            linewidth=1.7,
            label=label,
        )
    pixel_axis(axes, record["sizes"])
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), max(high, 1.1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_ylabel(f"speed-up of {backend} over torch", fontsize=9)
    axes.text(
        0.01,
        1.0,
        " equal",
        transform=axes.get_yaxis_transform(),
        va="bottom",
        fontsize=7.5,
        color=INK,
    )
    legend(axes, narrow, loc="best")
    return figure


def phases(record: Row, narrow: bool = False) -> Figure:
    """Where a step's time goes: the first variant at every resolution, ours beside torch, in shares
    of the step."""
    backends = [
        b
        for b in (sweep_record.REFERENCE_BACKEND, sweep_tables.ours(record))
        if b in record["settings"]["backends"]
    ]
    backends = list(dict.fromkeys(backends))
    first = record["settings"]["variants"][0]
    figure, axes = canvas(narrow, 5.6 if narrow else 4.4)
    labels, heights = [], []
    place, places = 0.0, []
    seen: set[str] = set()
    for row in record["sizes"]:
        for backend in backends:
            cell = next(
                (
                    c
                    for c in series(record, "pretrain", first, backend)
                    if c["resolution"] == row["resolution"]
                ),
                None,
            )
            if cell is None:
                continue
            parts = {
                name: cell["phases_ms"][name] for name in STEP_PHASES if name in cell["phases_ms"]
            } | {"data": cell["data_ms"]}
            whole = cell["step_ms"]
            bottom = 0.0
            for name, spent in parts.items():
                share = 100 * spent / whole
                axes.bar(
                    place,
                    share,
                    bottom=bottom,
                    width=0.8,
                    color=PHASE_COLOURS.get(name, MUTED),
                    edgecolor="#ffffff",
                    linewidth=0.6,
                    hatch=PHASE_HATCHES.get(name),
                    label=None if name in seen else name,
                )
                if share > 9:
                    axes.text(
                        place,
                        bottom + share / 2,
                        f"{share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="#ffffff",
                        fontweight="bold",
                    )
                seen.add(name)
                bottom += share
            axes.text(
                place,
                bottom + 1.5,
                f"{whole:.0f} ms" if whole >= 10 else f"{whole:.1f} ms",
                ha="center",
                va="bottom",
                fontsize=6.5,
                color=INK,
            )
            places.append(place)
            labels.append(
                f"{backend}\n{row['resolution']} px"
                if not narrow
                else f"{backend}\n{row['resolution']}"
            )
            heights.append(bottom)
            place += 0.9
        place += 0.5
    axes.set_xticks(places, labels, fontsize=7)
    axes.grid(False, axis="x")
    axes.axhline(100.0, color=INK, linewidth=0.9)
    axes.set_ylim(0, max(heights, default=100) * 1.08)
    axes.set_ylabel("% of the step (data: prepared beside it)", fontsize=9)
    options = {
        "fontsize": 7.5,
        "frameon": False,
        "ncols": 4 if narrow else 8,
        "columnspacing": 1.0,
        "handlelength": 1.2,
    }
    made = axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.14 if not narrow else -0.16), **options
    )
    for text in made.get_texts():
        text.set_color(INK)
    return figure


def memory(record: Row, narrow: bool = False) -> Figure:
    """Peak memory of a step against resolution, for both backends."""
    figure, axes = canvas(narrow, 5.0 if narrow else 4.0)
    first = record["settings"]["variants"][0]
    number = 0
    for mode, variant, label in (
        ("pretrain", first, f"pre-training ({first})"),
        ("finetune", sweep_record.ANY_VARIANT, "fine-tuning"),
    ):
        for backend in record["settings"]["backends"]:
            rows = [row for row in series(record, mode, variant, backend) if row["peak_bytes"]]
            if rows:
                dash = "-" if mode == "pretrain" else "--"
                places, values = [side(r) for r in rows], [r["peak_bytes"] / 2**20 for r in rows]
                look = {
                    "color": PALETTE[number],
                    "marker": MARKERS[number],
                    "markersize": 5,
                    "linewidth": 1.7,
                    "linestyle": dash,
                }
                axes.plot(places, values, label=f"{label}, {backend}", **look)
            number += 1
    pixel_axis(axes, record["sizes"])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylabel("peak memory [MiB]", fontsize=9)
    legend(axes, narrow, loc="lower right")
    return figure


def overhead(record: Row, narrow: bool = False) -> Figure:
    """What each variant's objectives add to a step at the largest resolution, the worst first."""
    backend = sweep_tables.ours(record)
    size = record["sizes"][-1]["resolution"]
    cells = [
        c
        for c in record["cells"]
        if c["status"] == "ok"
        and (c["mode"], c["backend"], c["resolution"]) == ("pretrain", backend, size)
        and c.get("overhead") is not None
    ]
    cells.sort(key=lambda cell: cell["overhead"])
    figure, axes = canvas(narrow, max(2.4, 0.5 + 0.22 * len(cells)))
    for place, cell in enumerate(cells):
        low, high = (100 * value for value in cell["overhead_interval"])
        middle = 100 * cell["overhead"]
        axes.plot(
            [low, high],
            [place, place],
            color=PALETTE[0],
            linewidth=2.4,
            alpha=0.45,
            solid_capstyle="round",
        )
        axes.plot([middle], [place], marker="o", markersize=5, color=PALETTE[0])
        axes.annotate(
            f"{middle:.1f} %",
            (max(high, middle), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=INK,
        )
    axes.set_yticks(range(len(cells)), [cell["variant"] for cell in cells], fontsize=7.5)
    axes.axvline(0.0, color=INK, linewidth=1.0)
    axes.margins(x=0.14)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"added to the step by the objectives at {size} px [%]", fontsize=9)
    return figure


def model(record: Row, narrow: bool = False) -> Figure:
    """The cost model of the first variant: its three parts, the measured sizes, and what it expects
    beyond them."""
    backend = sweep_tables.ours(record)
    first = record["settings"]["variants"][0]
    made = sweep_record.find(record["fits"], mode="pretrain", variant=first, backend=backend)
    figure, axes = canvas(narrow, 5.2 if narrow else 4.4)
    rows = series(record, "pretrain", first, backend)
    if made is None or not rows:
        return figure
    step = costmodel.Fit(
        *(
            made["step"][name]
            for name in ("constant", "per_token", "per_pair", "points", "worst_error")
        )
    )
    batch, frames = made["batch"], rows[0]["frames"]
    depth = max(1, frames // TUBELET_SIZE)
    smallest, largest = side(rows[0]), max(512.0, side(rows[-1]))
    pixels = [smallest * (largest / smallest) ** (i / 60) for i in range(61)]
    tokens = [depth * (value / 16) ** 2 for value in pixels]
    parts: list[tuple[str, Callable[[float], float], str, str]] = [
        ("constant", lambda n: step.constant, PALETTE[3], ":"),
        (
            "linear in tokens (layers, losses)",
            lambda n: step.per_token * batch * n,
            PALETTE[2],
            "--",
        ),
        ("quadratic (attention)", lambda n: step.per_pair * batch * n * n, PALETTE[1], "-."),
    ]
    for label, part, colour, dash in parts:
        values = [part(n) for n in tokens]
        if max(values) > 0:
            axes.plot(pixels, values, color=colour, linestyle=dash, linewidth=1.4, label=label)
    axes.plot(
        pixels,
        [step.predict(n, batch) for n in tokens],
        color=PALETTE[0],
        linewidth=1.8,
        label="their sum",
    )
    axes.plot(
        [side(r) for r in rows],
        [r["step_ms"] / 1e3 for r in rows],
        color=INK,
        marker="o",
        linestyle="",
        markersize=5,
        label="measured",
    )
    crossing = made["step"]["crossover_tokens"]
    bottom = max(min(step.predict(tokens[0], batch), rows[0]["step_ms"] / 1e3) / 30, 1e-4)
    axes.set_ylim(bottom=bottom)
    if crossing:
        place = 16 * (crossing / depth) ** 0.5
        if smallest <= place <= largest:
            axes.axvline(place, color=MUTED, linewidth=1.0)
            axes.text(
                place,
                bottom * 1.15,
                f" attention = the rest at {place:.0f} px",
                fontsize=7.5,
                color=INK,
                va="bottom",
                ha="right",
                rotation=90,
            )
    extra = [
        {
            "resolution": str(value),
            "tokens": int(depth * (value / 16) ** 2),
            "pixels": value * value,
        }
        for value in (384, 512)
    ]
    shown = [row for row in record["sizes"]] + [
        row for row in extra if side(row) > 1.2 * side(record["sizes"][-1])
    ]
    pixel_axis(axes, shown)
    log_values(axes, " s")
    axes.set_ylim(bottom=bottom)
    axes.set_ylabel(f"step time ({first})", fontsize=9)
    legend(axes, narrow, loc="upper left")
    return figure


FIGURES: dict[str, tuple[Callable[..., Figure], str]] = {
    "throughput": (throughput, "Throughput of every variant against frame resolution"),
    "modes": (modes, "Pre-training, fine-tuning and frozen features"),
    "speedup": (speedup, "Speed-up over the torch backend"),
    "phases": (phases, "Where a step's time goes"),
    "overhead": (overhead, "What the objectives add"),
    "model": (model, "Cost model and what it expects"),
    "memory": (memory, "Peak memory"),
}


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element with text as text, colours from CSS variables, and no ids that
    two figures could share."""
    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "hatch.linewidth": 0.6}
    ):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(?!m[0-9a-f]|p[0-9a-f]|h[0-9a-f])[A-Za-z.]+_\d+"', "", text)
    text = re.sub(r'(id="|url\(#|href="#)([A-Za-z])', rf"\1{name}-\2", text)
    for colour, variable in THEME.items():
        text = text.replace(colour.lower(), variable).replace(colour, variable)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = text.replace("#000000", THEME[INK])
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" role="img" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )
    return text
