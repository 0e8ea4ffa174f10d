"""HTML of the report: structure and tables here, style and script in `page.css` and `page.js`,
figures from `report_figures`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report_figures, report_text, sweep_tables

ASSETS = Path(__file__).resolve().parent / "page"
Row = dict[str, Any]
Cell = tuple[str, object]  # what is shown, what it sorts by


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def _document(title: str, body: str) -> str:
    style = (ASSETS / "page.css").read_text(encoding="utf-8")
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta '
        'name="color-scheme" content="light dark">\n'
        '<link rel="icon" '
        f'href="data:,">\n<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n{body}\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def table(
    name: str,
    header: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[Cell]],
    attributes: Sequence[dict[str, str]] | None = None,
) -> str:
    """A sortable table. `header`: (text, "text" or "number"); a number cell without a value sorts
    last."""
    arrow = '<span class="arrow" aria-hidden="true"></span>'
    head = "".join(
        f'<th scope="col" data-kind="{kind}"><button '
        f'type="button">{escape(text)}{arrow}</button></th>'
        for text, kind in header
    )
    lines = []
    for number, row in enumerate(rows):
        extra = "".join(
            f' data-{key}="{escape(value)}"'
            for key, value in (attributes[number] if attributes else {}).items()
        )
        cells = "".join(
            f'<td class="{kind}" '
            f'data-sort="{escape("" if key is None else key)}">{escape(shown)}</td>'
            for (shown, key), (_, kind) in zip(row, header, strict=True)
        )
        lines.append(f"<tr{extra}>{cells}</tr>")
    return (
        f'<div class="scroll"><table id="{name}" '
        f'class="sortable"><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def number(value: float | None, pattern: str = "{:.3g}") -> Cell:
    return ("–", None) if value is None else (pattern.format(value), value)


def percent(value: float | None, signed: bool = False) -> Cell:
    return (
        ("–", None)
        if value is None
        else (f"{100 * value:+.1f} %" if signed else f"{100 * value:.1f} %", value)
    )


def span(values: Sequence[float] | None, pattern: str = "{:.2f}", scale: float = 1.0) -> Cell:
    if values is None:
        return "–", None
    return f"{pattern.format(scale * values[0])} to {pattern.format(scale * values[1])}", values[0]


def figure(record: Row, name: str) -> str:
    """One figure, wide and narrow; CSS shows the one that fits."""
    draw, title = report_figures.FIGURES[name]
    wide = report_figures.inline_svg(draw(record), f"{name}w")
    narrow = report_figures.inline_svg(draw(record, narrow=True), f"{name}n")
    caption = escape(CAPTIONS[name])
    return (
        f'<section class="figure" id="figure-{name}"><h2>{escape(title)}</h2>'
        f'<div class="wide" aria-label="{escape(title)}">{wide}</div><div class="narrow" '
        f'aria-label="{escape(title)}">{narrow}</div>'
        f"<p>{caption}</p></section>"
    )


CAPTIONS = {
    "throughput": "Both axes are logarithmic. Bands are 95 % intervals of the median. The "
    "exponent is that of the fitted cost model at the "
    "largest resolution: step time grows as tokens to that power. Data preparation is not in "
    "these numbers (see the phases).",
    "modes": "Fine-tuning runs every token of a clip through the encoder and back; pre-training "
    "adds the target encoder and the predictor "
    "but sends only the visible tokens through the trained encoder. Fine-tuning + objective is "
    "the sum of both steps, measured apart.",
    "speedup": "Paired in one process, round by round; above the line our kernels are faster than "
    "the eager composition of the same step. "
    "Losses are shown like gains.",
    "phases": "Each bar is one backend at one resolution; the step ends at the line. Data "
    "(hatched, above it) is the time one process "
    "needs to prepare a batch; with loader workers it runs beside the step. The backward of the "
    "baseline's own losses is in backward; "
    "what an auxiliary objective adds is in objective, its backward included.",
    "overhead": "Each set of objectives is timed alone, forward and backward down to the "
    "features, paired with the baseline's on the same "
    "features. Bars are 95 % intervals of the median difference.",
    "model": "step = constant + linear in tokens + quadratic in tokens, fitted on relative error "
    "with no negative part. Beyond the "
    "measured points the line is what the planner (--predict) expects.",
    "memory": "On a CPU the highest resident set of a step, the interpreter and libraries "
    "included; on a GPU the allocator's peak.",
}


def _cells(record: Row) -> str:
    header = [
        ("variant", "text"),
        ("mode", "text"),
        ("backend", "text"),
        ("px", "number"),
        ("tokens", "number"),
        ("clips/s", "number"),
        ("step ms", "number"),
        ("95 % interval", "number"),
        ("tokens/s", "number"),
        ("x torch", "number"),
        ("objective", "number"),
        ("vs baseline", "number"),
        ("GFLOP", "number"),
        ("of peak", "number"),
        ("peak MiB", "number"),
    ]
    rows, attributes = [], []
    for cell in record["cells"]:
        lead: list[Cell] = [
            (cell["variant"], cell["variant"]),
            (cell["mode"], cell["mode"]),
            (cell["backend"], cell["backend"]),
            (cell["resolution"], cell["pixels"] ** 0.5),
            (f"{cell['tokens']}", cell["tokens"]),
        ]
        attributes.append({name: str(cell[name]) for name in ("mode", "backend", "resolution")})
        if cell["status"] != "ok":
            rows.append([*lead, (cell["status"], None), (cell["reason"], None), *[("–", None)] * 8])
            continue
        peak = None if cell["peak_bytes"] is None else cell["peak_bytes"] / 2**20
        rows.append(
            [
                *lead,
                number(cell["clips_per_s"]),
                number(cell["step_ms"], "{:.1f} busy" if cell.get("busy") else "{:.1f}"),
                span(cell["interval_ms"], "{:.1f}"),
                number(cell["tokens_per_s"], "{:,.0f}"),
                number(cell.get("speedup"), "{:.2f}"),
                percent(cell.get("overhead"), signed=True),
                percent(cell.get("over_baseline"), signed=True),
                number(cell["flop"] / 1e9, "{:.1f}"),
                percent(cell["peak_share"]),
                number(peak, "{:,.0f}"),
            ]
        )
    return _filters(record) + table("cells", header, rows, attributes)


def _filters(record: Row) -> str:
    settings = record["settings"]
    sizes = [row["resolution"] for row in record["sizes"]]
    chosen = {
        "mode": settings["modes"][0],
        "backend": sweep_tables.ours(record),
        "resolution": sizes[-1],
    }
    values = {"mode": settings["modes"], "backend": settings["backends"], "resolution": sizes}
    parts = []
    for name, options in values.items():
        items = "".join(
            "<option "
            f'value="{escape(option)}"{" selected" if option == chosen[name] else ""}>{escape(option)}</option>'
            for option in options
        )
        parts.append(
            f'<label>{name} <select data-filter="{name}"><option '
            f'value="">all</option>{items}</select></label>'
        )
    return f'<form class="filters" data-for="cells">{"".join(parts)}<output></output></form>'


def _overheads(record: Row) -> str:
    size, backend = record["sizes"][-1]["resolution"], sweep_tables.ours(record)
    cells = [
        c
        for c in record["cells"]
        if c["status"] == "ok"
        and (c["mode"], c["resolution"], c["backend"]) == ("pretrain", size, backend)
    ]
    cells = sorted(
        (c for c in cells if c.get("overhead") is not None), key=lambda c: -c["overhead"]
    )
    rows = [
        [
            (c["variant"], c["variant"]),
            number(c["objective_added_ms"], "{:.2f}"),
            span(c["objective_interval_ms"]),
            percent(c["overhead"]),
            span(c["overhead_interval"], "{:.1f}", 100),
            percent(c.get("over_baseline"), signed=True),
            (record["groups"][c["variant"]], record["groups"][c["variant"]]),
        ]
        for c in cells
    ]
    header = [
        ("variant", "text"),
        ("added ms", "number"),
        ("interval ms", "number"),
        ("of the step", "number"),
        ("interval %", "number"),
        ("step vs baseline", "number"),
        ("masks/target", "text"),
    ]
    return (
        table("overheads", header, rows)
        if rows
        else "<p>No variant of this sweep has an auxiliary objective.</p>"
    )


def _models(record: Row) -> str:
    rows = []
    for made in record["fits"]:
        step, check, memory = made["step"], made["holdout"], made["memory"]
        rows.append(
            [
                (made["variant"], made["variant"]),
                (made["mode"], made["mode"]),
                (made["backend"], made["backend"]),
                number(1e3 * step["constant"], "{:.2f}"),
                number(1e6 * step["per_token"], "{:.3g}"),
                number(1e9 * step["per_pair"], "{:.3g}"),
                number(made["exponents"][0], "{:.2f}"),
                number(made["exponents"][-1], "{:.2f}"),
                number(step["crossover_tokens"], "{:,.0f}"),
                percent(None if check is None else check["error"], signed=True),
                number(None if memory is None else memory["per_token"] / 2**10, "{:.1f}"),
            ]
        )
    header = [
        ("variant", "text"),
        ("mode", "text"),
        ("backend", "text"),
        ("constant ms", "number"),
        ("per token µs", "number"),
        ("per pair ns", "number"),
        ("exponent, smallest", "number"),
        ("exponent, largest", "number"),
        ("attention = rest at tokens", "number"),
        ("held-out error", "number"),
        ("KiB per token", "number"),
    ]
    return table("models", header, rows)


def _ops(record: Row) -> str:
    """The op table of `--main-job`; empty without one."""
    if not record.get("ops"):
        return ""
    rows = []
    for row in record["ops"]:
        lead: list[Cell] = [
            (str(row[name]), row[name])
            for name in ("op", "case", "dtype", "pass", "backend", "baseline")
        ]
        if row["status"] != "ok":
            rows.append([*lead, (row["status"], None), ("–", None), ("–", None), ("–", None)])
            continue
        share = percent(row["floor_share"])
        rows.append(
            [
                *lead,
                number(row["ratio"], "{:.2f}"),
                span(row["interval"]),
                number(row["candidate"]["median_ms"], "{:.3f}"),
                share,
            ]
        )
    header = [
        ("op", "text"),
        ("case", "text"),
        ("dtype", "text"),
        ("pass", "text"),
        ("backend", "text"),
        ("baseline", "text"),
        ("ratio", "number"),
        ("interval", "number"),
        ("our ms", "number"),
        ("floor / ours", "number"),
    ]
    note = (
        "Small cases, few rounds: baseline time over our time, so below 1 is a loss. Committed "
        "records have more."
    )
    return (
        "<section><h2>Ops against their "
        f"baselines</h2><p>{note}</p>{table('ops', header, rows)}</section>"
    )


def _box(record: Row) -> str:
    machine, settings = record["machine"], record["settings"]
    commit = machine.get("git_commit")
    facts = {
        "device": f"{machine['device']} ({machine['device_key']})",
        "cores, threads": f"{machine['cores']}, {machine['threads']}",
        "memory": f"{machine['memory_bytes'] / 2**30:.1f} GiB",
        "measured peak": f"{record['peak_flops'] / 1e9:,.0f} GFLOP/s, "
        f"{record['peak_bandwidth'] / 1e9:.1f} GB/s",
        "driver, CUDA": f"{machine['driver'] or '–'}, {machine['cuda'] or '–'}",
        "torch, triton": f"{machine['torch']}, {machine['triton'] or '–'}",
        "python": machine["python"],
        "commit": (commit[:12] if commit else "–")
        + (" + changes" if machine.get("git_dirty") else ""),
        "time": machine["time"],
        "model": f"{settings['size']}, {settings['frames']} frames, batch {settings['batch']}, "
        f"{settings['dtype']}",
        "data": settings["data"],
        "clock": {"wall": "wall", "cpu": "CPU time of one thread"}[settings.get("clock", "wall")],
        "load at the start": machine.get("load_average", "–"),
        "time spent": f"{sum(record['spent_s'].values()):.0f} s",
    }
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def render(record: Row, links: dict[str, str], files: Sequence[str]) -> str:
    settings = record["settings"]
    sizes = record["sizes"]
    title = "Video-JEPA throughput against frame resolution"
    sub = (
        f"{len(settings['variants'])} variants, {sizes[0]['resolution']} to "
        f"{sizes[-1]['resolution']} px, {settings['size']} encoder, "
        f"{settings['frames']} frames, batch {settings['batch']}, {settings['dtype']}, on "
        f"{record['machine']['device_key']}"
    )
    sentences = "".join(f"<li>{escape(text)}</li>" for text in report_text.findings(record))
    left = "".join(
        f"<li>{escape(row['resolution'])} px ({row['tokens']} tokens): {escape(row['reason'])}</li>"
        for row in record["left_out"]
    )
    items = "".join(
        f'<li><a href="{escape(target)}">{escape(name)}</a></li>' for name, target in links.items()
    )
    pictures = "".join(f'<li><a href="{escape(name)}">{escape(name)}</a></li>' for name in files)
    crossover = record["flop_crossover_tokens"]
    body = f"""<header><p class="kicker">jepa_kernels sweep</p><h1>{escape(title)}</h1><p class="sub">{escape(sub)}</p></header>
<main>
<section id="findings"><h2>What it says</h2><ol>{sentences}</ol></section>
{"".join(figure(record, name) for name in report_figures.FIGURES)}
<section><h2>Cost of the objectives, worst first</h2>{_overheads(record)}</section>
<section><h2>Every cell</h2><p>Sort by any column; filter below. "x torch" is the paired speed-up of the backend over torch.</p>
{_cells(record)}</section>
<section><h2>Cost models</h2><p>step = constant + per token + per pair of tokens of a clip. By FLOP alone, attention equals the linear
layers of an encoder block at {crossover:,.0f} tokens per clip.</p>{_models(record)}</section>
{_ops(record)}
{f"<section><h2>Left out</h2><ul>{left}</ul></section>" if left else ""}
<section><h2>Machine and versions</h2>{_box(record)}</section>
<section><h2>Reproduce</h2><pre><code>{escape(record["command"])}</code></pre><ul class="links">{items}</ul>
<details><summary>Figures as files</summary><ul class="links">{pictures}</ul></details></section>
</main>"""
    return _document(title, body)


def render_comparison(records: Sequence[Row], paths: Sequence[Path], rows: Sequence[Row]) -> str:
    from benchmarks.report_compare import counts

    title = "Two sweeps compared"
    tally = "".join(
        f'<li class="{verdict.replace(" ", "-")}"><b>{count}</b> {verdict}</li>'
        for verdict, count in counts(rows).items()
    )
    header = [
        ("verdict", "text"),
        ("mode", "text"),
        ("variant", "text"),
        ("px", "text"),
        ("backend", "text"),
        ("before ms", "number"),
        ("after ms", "number"),
        ("after / before", "number"),
        ("range", "number"),
    ]
    lines = [
        [
            *(
                (str(row[name]), row[name])
                for name in ("verdict", "mode", "variant", "resolution", "backend")
            ),
            number(row["before_ms"], "{:.1f}"),
            number(row["after_ms"], "{:.1f}"),
            number(row["ratio"], "{:.2f}"),
            span(row["range"]),
        ]
        for row in rows
    ]
    attributes = [{"verdict": row["verdict"].replace(" ", "-")} for row in rows]
    boxes = "".join(
        f"<section><h2>{label}: {escape(path.name)}</h2>{_box(record)}</section>"
        for label, path, record in zip(("Before", "After"), paths, records, strict=True)
    )
    body = f"""<header><p class="kicker">jepa_kernels sweep</p><h1>{title}</h1>
<p class="sub">A change counts when the 95 % intervals of the two step times do not overlap.</p></header>
<main><section><h2>Verdict</h2><ul class="tally">{tally}</ul>{table("comparison", header, lines, attributes)}</section>{boxes}</main>"""
    return _document(title, body)
