"""The answer of the sample-efficiency study, drawn from the records that are there: tables with
paired differences, and plots. Nothing is said of cells that are not on record."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.efficiency_cell import VARIANTS
from benchmarks.efficiency_statistics import (
    Difference,
    Interval,
    difference,
    gain,
    group_share,
    mean_interval,
    smallest_seen,
)
from benchmarks.machine import REPOSITORY
from benchmarks.plot import PALETTE, style
from benchmarks.sample_efficiency import read_records
from jepa.probe import group_of

GROUPS = ("motion", "appearance")
# A series is the runs of one variant that differ in their seed alone.
Setting = tuple[str, int, int, int]  # masks, side, unique clips, steps


class Study:
    """Records by what they are. A series holds a variant's cells of one setting, by seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        records = read_records(path)
        self.untrained: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.beside: dict[tuple[str, int], dict[str, Any]] = {}
        self.series: dict[Setting, dict[str, dict[int, dict[str, Any]]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        for record in records:
            if record["kind"] == "cell":
                setting = tuple(record[name] for name in ("masks", "side", "clips", "steps"))
                self.series[setting][record["variant"]][record["seed"]] = record
            elif record["kind"] == "untrained":
                self.untrained[record["side"]][record["seed"]] = record
            else:
                self.beside[record["kind"], record["side"]] = record

    def settings(self) -> list[Setting]:
        """New clips first, then by falling number of unique clips."""
        return sorted(self.series, key=lambda s: (s[1], s[0], s[3], s[2] != 0, -s[2]))

    def variants(self, setting: Setting) -> list[str]:
        return [name for name in VARIANTS if name in self.series[setting]]


def hits(point: Mapping[str, Any], group: str, tests: int) -> np.ndarray:
    names = [name for name in point["hits"] if group_of(name) == group]
    return group_share(point["hits"], names, tests)


def final(cells: Mapping[int, dict[str, Any]], seeds: Iterable[int], group: str) -> np.ndarray:
    """[seeds, clips] of the last checkpoint."""
    return np.stack([hits(cells[s]["points"][-1], group, cells[s]["tests"]) for s in seeds])


def curve(
    study: Study, setting: Setting, variant: str, seeds: Sequence[int], group: str
) -> np.ndarray:
    """[points, seeds, clips], the first point being the untrained encoder of the same seed."""
    cells, start = study.series[setting][variant], study.untrained[setting[1]]
    parts = []
    for seed in seeds:
        points = [start[seed]["points"][0], *cells[seed]["points"]]
        parts.append(np.stack([hits(p, group, cells[seed]["tests"]) for p in points]))
    return np.stack(parts, axis=1)


def percent(value: Interval, sign: bool = False) -> str:
    form = "{:+.1f} [{:+.1f}, {:+.1f}]" if sign else "{:.1f} [{:.1f}, {:.1f}]"
    return form.format(*(100 * v for v in (value.value, value.low, value.high)))


def _apart(found: Difference | None) -> str:
    return "" if found is None else percent(found, sign=True) + ("*" if found.strict else "")


def named(setting: Setting) -> str:
    masks, side, clips, steps = setting
    data = f"{clips} unique clips" if clips else "every clip new"
    return f"{side} px, {masks} masks, {data}, {steps} steps"


def text(path: Path) -> str:
    """The tables as Markdown."""
    study = Study(path)
    if not study.series:
        return "No record is committed yet."
    lines = [f"Record: `{_shown(path)}`, a line per measurement.", ""]
    lines += beside_table(study)
    for setting in study.settings():
        lines += ["", *setting_tables(study, setting)]
    return "\n".join(lines)


def beside_table(study: Study) -> list[str]:
    """Untrained encoders, pixels and training on labels."""
    lines = [
        "| beside the cells | side | motion | appearance | each question |",
        "|---|---|---|---|---|",
    ]
    for side in sorted(study.untrained):
        records = study.untrained[side]
        values = {
            group: [100 * _mean_of(r["points"][0]["linear"], group) for r in records.values()]
            for group in GROUPS
        }
        cells = [f"{np.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in values.values()]
        questions = {
            name: np.mean([r["points"][0]["linear"][name] for r in records.values()])
            for name in next(iter(records.values()))["points"][0]["linear"]
        }
        lines.append(
            f"| {len(records)} untrained encoders, mean (range) | {side} | {' | '.join(cells)} | "
            f"{_each(questions)} |"
        )
    for (kind, side), record in sorted(study.beside.items()):
        top1 = record["top1"] if kind == "supervised" else record["points"][0]["linear"]
        name = (
            f"trained on labels, {record['cpu_s']:.0f} s of processor time"
            if kind == "supervised"
            else "pixels, 8 x 8 a frame"
        )
        cells = [f"{100 * _mean_of(top1, group):.1f}" for group in GROUPS]
        lines.append(f"| {name} | {side} | {' | '.join(cells)} | {_each(top1)} |")
    return lines


def _mean_of(top1: Mapping[str, float], group: str) -> float:
    return float(np.mean([value for name, value in top1.items() if group_of(name) == group]))


def _each(top1: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.0f}" for name, value in top1.items())


def setting_tables(study: Study, setting: Setting) -> list[str]:
    """Accuracies, differences to the baseline of the same seeds, the gain in clips, and costs."""
    series, variants = study.series[setting], study.variants(setting)
    compared = [name for name in variants if name != "baseline" and "baseline" in series]
    # To the untrained start and, but for itself, to the baseline.
    comparisons = len(GROUPS) * (len(variants) + len(compared))
    lines = [
        f"**{named(setting)}**",
        "",
        "| variant | seeds | motion | appearance | motion - untrained | appearance - untrained | "
        "motion - baseline | appearance - baseline | clips the baseline needs, motion | TFLOP | "
        "processor s | effective rank |",
        f"|{'---|' * 12}",
    ]
    spreads = []
    for name in variants:
        cells = series[name]
        seeds = sorted(cells)
        start = study.untrained[setting[1]]
        row = [name, str(len(seeds))]
        row += [percent(mean_interval(final(cells, seeds, group))) for group in GROUPS]
        started = [seed for seed in seeds if seed in start]
        for group in GROUPS:
            found = (
                difference(final(cells, started, group), final(start, started, group), comparisons)
                if started
                else None
            )
            row.append(_apart(found))
        paired = [seed for seed in seeds if seed in series.get("baseline", {})]
        if name in compared and paired:
            for group in GROUPS:
                found = difference(
                    final(cells, paired, group),
                    final(series["baseline"], paired, group),
                    comparisons,
                )
                row.append(_apart(found))
                spreads.append((group, found.spread, found.seeds))
            both = [seed for seed in paired if seed in start]
            row.append(_gain_cell(study, setting, name, both) if both else "")
        else:
            row += ["", "", ""]
        last = [cells[seed]["points"][-1] for seed in seeds]
        row.append(f"{np.mean([p['flop'] for p in last]) / 1e12:.2f}")
        row.append(f"{np.mean([p['cpu_s'] for p in last]):.0f}")
        row.append(f"{np.mean([cells[s]['curves']['effective_rank'][-1] for s in seeds]):.0f}")
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", power_sentence(spreads, comparisons)] if spreads else []
    lines += ["", *label_table(study, setting)]
    return lines


def _gain_cell(study: Study, setting: Setting, name: str, seeds: Sequence[int]) -> str:
    one, other = (curve(study, setting, v, seeds, "motion") for v in ("baseline", name))
    points = study.series[setting][name][seeds[0]]["points"]
    clips = np.array([0.0, *(point["clips_seen"] for point in points)])
    found = gain(clips, one, other)
    if math.isnan(found.ratio.value) or found.defined < 0.5:
        return f"not defined ({100 * found.defined:.0f} % of draws)"
    ratio = found.ratio
    return f"{ratio.value:.1f} x [{ratio.low:.1f}, {ratio.high:.1f}]"


def power_sentence(spreads: Sequence[tuple[str, float, int]], comparisons: int) -> str:
    """What a difference would have had to be."""
    parts = []
    for group in GROUPS:
        found = [(s, n) for g, s, n in spreads if g == group and n > 1]
        if found:
            least = np.median([smallest_seen(s, n) for s, n in found])
            parts.append(f"{100 * least:.1f} points of {group}")
    seen = (
        f"With the spread over these seeds a paired t-test at 5 % sees {' and '.join(parts)} with "
        "80 % power (median over variants)."
        if parts
        else "One seed: intervals are over test clips alone and say nothing about other seeds."
    )
    return (
        f"Intervals are 95 %, over seeds and test clips, paired. {comparisons} differences are "
        f"looked at; * marks those whose interval at 1 - 5 % / {comparisons} leaves out 0. {seen}"
    )


def label_table(study: Study, setting: Setting) -> list[str]:
    """Label efficiency and nearest neighbours of the last checkpoint."""
    series = study.series[setting]
    first = next(iter(next(iter(series.values())).values()))
    shares = list(first["points"][-1]["fewer_labels"])
    names = [f"{float(share) * first['labels']:.0f}" for share in shares]
    head = [f"{group}, {name} labels" for group in GROUPS for name in (*names, first["labels"])]
    head += [f"{group}, k-NN" for group in GROUPS]
    lines = [f"| variant | {' | '.join(head)} |", f"|{'---|' * (len(head) + 1)}"]

    def row(name: str, points: Sequence[Mapping[str, Any]]) -> str:
        values = []
        for group in GROUPS:
            for share in shares:
                values.append(np.mean([_mean_of(p["fewer_labels"][share], group) for p in points]))
            values.append(np.mean([_mean_of(p["linear"], group) for p in points]))
        values += [np.mean([_mean_of(p["knn"], group) for p in points]) for group in GROUPS]
        return f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |"

    for name in study.variants(setting):
        lines.append(row(name, [cell["points"][-1] for cell in series[name].values()]))
    start = study.untrained[setting[1]]
    if start:
        lines.append(row("untrained", [record["points"][0] for record in start.values()]))
    return lines


def plotted(path: Path, folder: Path) -> list[Path]:
    """Learning curves over clips and over cost of every setting, and accuracy against unique
    clips."""
    import matplotlib

    matplotlib.use("Agg")
    study = Study(path)
    if not study.series:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = [_curves(study, setting, folder) for setting in study.settings()]
    several = defaultdict(list)
    for setting in study.settings():
        several[setting[0], setting[1], setting[3]].append(setting)
    written += [_unique(study, found, folder) for found in several.values() if len(found) > 1]
    return written


def _colour(name: str) -> str:
    return PALETTE[list(VARIANTS).index(name) % len(PALETTE)]


def _curves(study: Study, setting: Setting, folder: Path) -> Path:
    from matplotlib import pyplot

    axes_of = {"clips_seen": "clips seen", "flop": "FLOP", "cpu_s": "processor seconds, one core"}
    figure, axes = pyplot.subplots(3, 3, figsize=(13, 10.5), layout="constrained")
    start = study.untrained[setting[1]]
    for name in study.variants(setting):
        cells = study.series[setting][name]
        seeds = [seed for seed in sorted(cells) if seed in start]
        if not seeds:
            continue
        for row, group in enumerate(GROUPS):
            found = curve(study, setting, name, seeds, group).mean(2)
            for column, (key, label) in enumerate(axes_of.items()):
                x = np.mean([[0.0, *(p[key] for p in cells[s]["points"])] for s in seeds], axis=0)
                axis = axes[row][column]
                axis.plot(x, 100 * found.mean(1), color=_colour(name), label=name, marker=".")
                if len(seeds) > 1:
                    axis.fill_between(
                        x, 100 * found.min(1), 100 * found.max(1), color=_colour(name), alpha=0.12
                    )
                axis.set(xlabel=label, ylabel=f"{group}, top-1 in %")
        for column, (key, label) in enumerate(
            (
                ("prediction", "prediction loss (dotted: of the mean)"),
                ("effective_rank", "effective rank"),
                ("teacher_student_cosine", "teacher-student cosine"),
            )
        ):
            axis = axes[2][column]
            curves = [cells[seed]["curves"] for seed in seeds]
            axis.plot(
                curves[0]["step"],
                np.mean([[np.nan if v is None else v for v in c[key]] for c in curves], axis=0),
                color=_colour(name),
            )
            if key == "prediction":
                axis.plot(
                    curves[0]["step"],
                    np.mean([c["mean_prediction"] for c in curves], axis=0),
                    ":",
                    color=_colour(name),
                    linewidth=0.8,
                )
            axis.set(xlabel="step", title=label)
    for row, group in enumerate(GROUPS):
        values = [100 * _mean_of(r["points"][0]["linear"], group) for r in start.values()]
        for axis in axes[row]:
            if values:
                axis.axhspan(min(values), max(values), color="black", alpha=0.08)
    for axis in axes.flat:
        style(axis)
    axes[0][0].legend(fontsize="small")
    figure.suptitle(
        f"{named(setting)}: linear probe of the frozen encoder; grey: untrained encoders; bands: "
        "range over seeds"
    )
    masks, side, clips, steps = setting
    path = folder / f"curves_{masks}_{side}px_{clips or 'new'}_{steps}.png"
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path


def _unique(study: Study, settings: Sequence[Setting], folder: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(GROUPS), figsize=(10, 4), layout="constrained")
    ordered = sorted(settings, key=lambda s: (s[2] == 0, s[2]))
    for axis, group in zip(axes, GROUPS):
        for name in VARIANTS:
            places, means = [], []
            for place, setting in enumerate(ordered):
                cells = study.series[setting].get(name, {})
                if cells:
                    places.append(place)
                    means.append(100 * final(cells, sorted(cells), group).mean())
            if places:
                axis.plot(places, means, marker="o", color=_colour(name), label=name)
        axis.set_xticks(range(len(ordered)), [str(s[2] or "all new") for s in ordered])
        axis.set(xlabel="unique clips", ylabel=f"{group}, top-1 in %")
        style(axis)
    axes[0].legend(fontsize="small")
    masks, side, _, steps = settings[0]
    path = folder / f"unique_clips_{masks}_{side}px_{steps}.png"
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path


def _shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)
