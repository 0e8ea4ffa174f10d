"""The study on real and on generated clips: pre-train variants, probe and fine-tune them beside an
untrained encoder and bare pixels.

    python -m benchmarks.study --ucf101 VIDEOS --lists LISTS --train-list A --test-list B      the
    full form, hours on two cores python -m benchmarks.study --steps 20 --shapes-steps 20 --variants
    baseline                 a small form; records say what was run

Real clips: micro at 112 px, variants baseline and fwm_hw_ld. Generated clips: micro at 64 px,
baseline, kinematic, ld and fwm_hw_ld. Writes benchmarks/results/<device>/study.json and PNG plots
beside it. A run that was cut off goes on where it stopped (runs/study).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch

from benchmarks.machine import device_key, provenance
from benchmarks.plot import PALETTE
from jepa import finetune, pretrain, probe
from jepa.atomic import write_json
from jepa.data.build import DataConfig, Location
from jepa.data.moving_shapes import APPEARANCE
from jepa.schedules import ScheduleConfig
from jepa.variants import variant

matplotlib.use("Agg")
from matplotlib import pyplot

SHAPES_VARIANTS = ("baseline", "kinematic", "ld", "fwm_hw_ld")
REAL_VARIANTS = ("baseline", "fwm_hw_ld")
STYLES = ("-", "--", ":")
# Options that change what is measured of a finished run.
MEASURED_WITH = ("probe_seeds", "probe_epochs", "train_clips", "test_clips", "finetune_steps")
CURVES = ("loss", "effective_rank", "teacher_student_cosine", "step")


@dataclass(frozen=True)
class Part:
    """One data set of the study: what to pre-train on and how long."""

    name: str
    data: DataConfig
    side: int
    steps: int
    variants: tuple[str, ...]


def pretraining(
    part: Part, name: str, runs: Path, seed: int, batch_size: int
) -> pretrain.PretrainConfig:
    warmup = max(1, part.steps // 10)
    return pretrain.PretrainConfig(
        variant=variant(name),
        schedule=ScheduleConfig(
            total_steps=part.steps, warmup_steps=warmup, momentum=0.99, final_momentum=0.999
        ),
        data=part.data,
        output=runs / part.name / f"{name}-{part.steps}-{seed}",
        batch_size=batch_size,
        height=part.side,
        width=part.side,
        seed=seed,
        log_every=max(1, part.steps // 40),
        checkpoint_every=max(1, part.steps // 4),
        keep_last=1,
    )


def measured(part: Part, name: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One variant: curves, probes and, on real clips, fine-tuning with and without its start. What
    the same options measured is kept."""
    cfg = pretraining(part, name, options.runs, seed, options.batch_size)
    asked = {key: getattr(options, key) for key in MEASURED_WITH}
    kept = cfg.output / "measured.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["asked"] == asked:
            return dict(found["record"])
    record = _measured(part, name, options, cfg)
    write_json(kept, {"asked": asked, "record": record})
    return record


def _measured(
    part: Part, name: str, options: argparse.Namespace, cfg: pretrain.PretrainConfig
) -> dict[str, Any]:
    pretrain.run(cfg)
    lines = [
        json.loads(line)
        for line in (cfg.output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    record: dict[str, Any] = {
        "part": part.name,
        "variant": name,
        "seed": cfg.seed,
        "steps": part.steps,
        "samples": part.steps * options.batch_size,
        "side_px": part.side,
        "curves": {key: [line.get(key) for line in lines] for key in CURVES},
    }
    probing = probe.ProbeConfig(
        run=cfg.output,
        seeds=tuple(range(options.probe_seeds)),
        epochs=options.probe_epochs,
        train_clips=options.train_clips,
        test_clips=options.test_clips,
    )
    record["probe"] = {**probe.run(probing), "run": str(cfg.output.relative_to(options.runs))}
    if part.name == "ucf101" and options.finetune_steps > 0:
        tuning = finetune.FinetuneConfig(
            run=cfg.output,
            steps=options.finetune_steps,
            warmup_steps=max(1, options.finetune_steps // 10),
        )
        kept = 0.0 if name == "baseline" else 0.1
        record["finetune"] = finetune.run(tuning)
        record["finetune_scratch"] = finetune.run(
            replace(tuning, scratch=True, output=cfg.output / "finetune_scratch.json")
        )
        if kept:
            record["finetune_objective"] = finetune.run(
                replace(
                    tuning, objective_weight=kept, output=cfg.output / "finetune_objective.json"
                )
            )
    return record


def parts_of(options: argparse.Namespace) -> list[Part]:
    def chosen(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if not options.variants or name in options.variants)

    parts = []
    if options.shapes_steps > 0:
        parts.append(
            Part("moving_shapes", DataConfig(), 64, options.shapes_steps, chosen(SHAPES_VARIANTS))
        )
    if options.ucf101 is not None:
        place = Location(
            files=options.ucf101,
            lists=options.lists,
            list_file=options.train_list,
            test_list_file=options.test_list,
        )
        parts.append(
            Part(
                "ucf101",
                DataConfig(kind="ucf101", at=place),
                112,
                options.steps,
                chosen(REAL_VARIANTS),
            )
        )
    return parts


def plotted(records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Curves of every part, and what its probes answered beside chance. A colour is a variant, a
    line style a seed."""
    written = []
    for name in sorted({record["part"] for record in records}):
        own = [record for record in records if record["part"] == name]
        variants = list(dict.fromkeys(record["variant"] for record in own))
        seeds = list(dict.fromkeys(record["seed"] for record in own))
        figure, axes = pyplot.subplot_mosaic(
            [["loss", "rank", "cosine"], ["bars"] * 3], figsize=(13, 8), layout="constrained"
        )
        curves = {
            "loss": ("loss", "loss (its own sum of terms)"),
            "rank": ("effective_rank", "effective rank of the teacher's features"),
            "cosine": ("teacher_student_cosine", "teacher-student cosine"),
        }
        for key, (curve, title) in curves.items():
            for record in own:
                colour, style = (
                    PALETTE[variants.index(record["variant"])],
                    STYLES[seeds.index(record["seed"]) % len(STYLES)],
                )
                label = (
                    record["variant"]
                    if len(seeds) == 1
                    else f"{record['variant']}, seed {record['seed']}"
                )
                axes[key].plot(
                    record["curves"]["step"],
                    record["curves"][curve],
                    color=colour,
                    linestyle=style,
                    label=label,
                )
            axes[key].set(title=title, xlabel="optimiser step")
        axes["loss"].legend(fontsize="small")
        _bars(axes["bars"], own, variants)
        path = folder / f"study_{name}.png"
        figure.savefig(path, dpi=100)
        pyplot.close(figure)
        written.append(path)
    return written


def _bars(axis: Any, records: Sequence[dict[str, Any]], variants: Sequence[str]) -> None:
    """A bar per encoder and question: the mean over seeds of pre-training (dots), with the mean of
    their intervals."""
    sources = [
        (name, [r["probe"]["results"]["trained"] for r in records if r["variant"] == name])
        for name in variants
    ]
    sources += [(name, [records[0]["probe"]["results"][name]]) for name in ("untrained", "pixels")]
    questions = list(sources[0][1][0])
    width = 0.8 / len(sources)
    for i, (label, results) in enumerate(sources):
        places = [x + i * width for x in range(len(questions))]
        values = [fmean([r[q]["top1"] for r in results]) for q in questions]
        below = [
            v - fmean([r[q]["interval"][0] for r in results]) for q, v in zip(questions, values)
        ]
        above = [
            fmean([r[q]["interval"][1] for r in results]) - v for q, v in zip(questions, values)
        ]
        axis.bar(
            places,
            values,
            width,
            yerr=[below, above],
            label=label,
            color=PALETTE[i],
            error_kw={"linewidth": 0.7},
        )
        if len(results) > 1:
            for result in results:
                axis.plot(
                    places, [result[q]["top1"] for q in questions], ".", color="black", markersize=4
                )
    for x, question in enumerate(questions):
        axis.hlines(
            sources[0][1][0][question]["chance"],
            x - width / 2,
            x + 0.8 - width / 2,
            color="black",
            linewidth=1,
        )
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(questions))], questions)
    axis.set(title="probe top-1, 95 % intervals, black line: chance", ylim=(0, 1))
    axis.legend(fontsize="small", ncols=len(sources), loc="upper right")


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per encoder: mean accuracy over appearance and over motion questions, or of the
    class."""
    rows = []
    for record in records:
        for source, result in record["probe"]["results"].items():
            groups: dict[str, list[float]] = {}
            for question, value in result.items():
                group = (
                    question
                    if question == "class"
                    else "appearance"
                    if question in APPEARANCE
                    else "motion"
                )
                groups.setdefault(group, []).append(value["top1"])
            means = {group: fmean(values) for group, values in groups.items()}
            rows.append(
                {
                    "part": record["part"],
                    "variant": record["variant"],
                    "seed": record["seed"],
                    "encoder": source,
                    **means,
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ucf101",
        type=Path,
        help="folder of class folders; without it only generated clips are studied",
    )
    parser.add_argument("--lists", type=Path, help="folder of classInd.txt")
    parser.add_argument("--train-list", type=Path)
    parser.add_argument("--test-list", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="pre-training steps on real clips")
    parser.add_argument(
        "--shapes-steps",
        type=int,
        default=2000,
        help="pre-training steps on moving_shapes, 0 for none",
    )
    parser.add_argument("--finetune-steps", type=int, default=150)
    parser.add_argument("--variants", nargs="*", default=[], help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of pre-training")
    parser.add_argument("--probe-seeds", type=int, default=3)
    parser.add_argument("--probe-epochs", type=int, default=20)
    parser.add_argument(
        "--train-clips",
        type=int,
        default=1000,
        help="labelled clips of moving_shapes for the probe",
    )
    parser.add_argument("--test-clips", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.ucf101 is not None and options.lists is None:
        parser.error("--lists must be given with --ucf101")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = options.results / device_key()
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for part in parts_of(options):
        for name in part.variants:
            for seed in options.seeds:
                records.append(measured(part, name, options, seed))
                plain = {
                    key: str(value) if isinstance(value, Path) else value
                    for key, value in vars(options).items()
                }
                del plain["runs"], plain["results"]
                head = {
                    "schema": 1,
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    "options": plain,
                    "environment": provenance(),
                }
                # Rewritten after every run, so that a study that is cut off leaves what it has.
                write_json(
                    folder / "study.json", {**head, "summary": summary(records), "records": records}
                )
    for path in plotted(records, folder):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
