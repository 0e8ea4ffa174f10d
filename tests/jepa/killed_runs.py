"""Kills a run again and again, lets it finish, and compares it with one that was left alone.

    python -m tests.jepa.killed_runs FOLDER [SIGINT] [steps=24] pretrain=20 finetune=5 encode=10

Run by test_checkpoint.py and tests/reliability in a process of its own. Every attempt is a fork of
this process, which has imported everything and started no thread, so that an attempt costs no
start-up; a run that is done before all kills are is begun again in a new folder. Prints for each
kind {"kills", "inside_a_save", "resumed_from", "runs", "different"} as JSON; `different` names what
is not as in the run that was left alone, of which there must be nothing.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.utils.tensorboard  # imported once here instead of in every attempt
from PIL import Image

from jepa import encode, evaluation, finetune, pretrain, probe
from jepa.checkpoint import Checkpoints
from jepa.data.build import DataConfig
from jepa.step import loss_step, new_state
from tests.jepa.run_cases import tiny_run
from tests.jepa.training_cases import make_batch

# Of a whole run of training; `steps` changes it.
STEPS = 24


def pretraining(folder: Path) -> tuple[Callable[[], object], Path]:
    """What runs (or resumes) in `folder`, and where its checkpoints are."""
    cfg = tiny_run(folder, steps=STEPS, name="fwm_hw_ld")
    return lambda: pretrain.run(cfg), folder / "checkpoints"


def finetuning(folder: Path) -> tuple[Callable[[], object], Path]:
    """The same for a fine-tuning of the run beside it, its objective kept on."""
    cfg = finetune.FinetuneConfig(
        run=folder.parent / "run",
        train_clips=8,
        test_clips=4,
        steps=STEPS,
        batch_size=2,
        objective_weight=0.5,
        threads=1,
        data=DataConfig(target="colour"),
        output=folder / "result.json",
        checkpoint_every=1,
    )
    return lambda: finetune.run(cfg), folder / "result" / "checkpoints"


def attempt(work: Callable[[], object]) -> tuple[int, int]:
    """Forks a process that does the work; returns its id and a pipe that it writes to when its
    first step begins."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for module, name in (
        (pretrain, "train_step"),
        (finetune, "logits_of"),
        (evaluation, "_write_features"),
        (probe, "train_probe"),
        (encode, "read_image"),
    ):
        announce(module, name, writer)
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def announce(module: object, name: str, writer: int) -> None:
    function = getattr(module, name)

    def announced(*arguments: object) -> object:
        os.write(writer, b".")
        return function(*arguments)

    setattr(module, name, announced)


def ended_well(child: int, reader: int) -> bool:
    os.close(reader)
    return os.waitpid(child, 0)[1] == 0


def warm_up() -> None:
    """Loads what a first forward pass loads. No backward pass: its threads would not survive the
    fork."""
    cfg = tiny_run(Path("unused"), name="fwm_hw_ld")
    with torch.no_grad():
        loss_step(new_state(cfg).bundle, make_batch((2, 4, 4)), cfg)


def probing(folder: Path) -> tuple[Callable[[], object], Path]:
    """Features of two splits, computed anew, and a probe on them. Features lie in the run's folder,
    so each has a run of its own."""
    if not (folder / "run").is_dir():
        shutil.copytree(folder.parent / "run", folder / "run")
    cfg = probe.ProbeConfig(
        run=folder / "run",
        data=DataConfig(target="colour"),
        train_clips=24,
        test_clips=12,
        kinds=("linear",),
        steps=20,
        batch_size=8,
        weight_decays=(0.01,),
        pixels=False,
        threads=1,
        output=folder / "result.json",
    )
    return lambda: probe.run(cfg), folder / "run" / "features"


def encoding(folder: Path) -> tuple[Callable[[], object], Path]:
    """Features of a folder of pictures and videos."""
    source = folder.parent / "in"
    if not source.is_dir():
        source.mkdir()
        for number in range(12):
            Image.new("RGB", (64, 64), (20 * number, 9, 200)).save(source / f"{number}.png")
    cfg = encode.EncodeConfig(source, folder / "out", run=folder.parent / "run", threads=1)
    return lambda: encode.run(cfg), folder / "out"


KINDS = {
    "pretrain": pretraining,
    "finetune": finetuning,
    "probe": probing,
    "encode": encoding,
}


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same bit for bit: every file but locks, logs and TensorBoard's, whose lines
    hold times."""
    skipped = (".lock", ".features.lock", "log.jsonl", "config.yaml", "state.json")
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in skipped and "tensorboard" not in path.parts:
            content = path.read_bytes()
            if path.name == "result.json":
                value = json.loads(content)
                value.pop("test_s", None)
                content = json.dumps({**value, "run": ""}).encode()
            found[str(path.relative_to(folder))] = content
    return found


def main(folder: Path, kills: dict[str, int], interrupts: bool) -> int:
    logging.disable(logging.WARNING)
    # A shell's background job is started with it ignored: then no run would ever be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    warm_up()
    reports = {}
    for kind, count in kills.items():
        place = folder / kind
        place.mkdir(parents=True)
        first = tiny_run(place / "run", steps=1, name="fwm_hw_ld")
        if kind != "pretrain" and not ended_well(*attempt(lambda cfg=first: pretrain.run(cfg))):
            return 1
        reports[kind] = killed(place, count, kind, interrupts)
    print(json.dumps(reports))
    return 0


def killed(folder: Path, kills: int, kind: str, interrupts: bool) -> dict[str, object]:
    """Kills one kind of run `kills` times."""
    make = KINDS[kind]
    whole, _ = make(folder / "whole")
    child, reader = attempt(whole)
    os.read(reader, 1)
    began = time.perf_counter()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the {kind} run that was left alone failed")
    duration = time.perf_counter() - began
    wanted = contents(folder / "whole")
    rng = random.Random(0)
    done = inside = runs = 0
    resumed: list[int] = []
    different: list[str] = []
    span = 2 / STEPS * duration if kind in ("pretrain", "finetune") else duration / 4
    while done < kills or not runs:
        name = "killed" if not runs else f"killed{runs}"
        work, place = make(folder / name)
        checkpoints = Checkpoints(place)
        while done < kills:
            child, reader = attempt(work)
            os.read(reader, 1)
            # Two steps and saves or less; an attempt that is killed in its first step makes no
            # progress.
            time.sleep(rng.uniform(0.0, span))
            os.kill(child, signal.SIGINT if interrupts else signal.SIGKILL)
            if ended_well(child, reader):
                break
            done += 1
            left = [entry for entry in (folder / name).rglob(".writing-*")]
            inside += bool(left)
            if interrupts and left:
                different += [f"{name}: {entry.name} was left behind" for entry in left]
            if kind in ("pretrain", "finetune"):
                for step in checkpoints.steps():
                    checkpoints.load(step)
                resumed.append(max(checkpoints.steps(), default=0))
        if not ended_well(*attempt(work)):
            raise RuntimeError(f"the {kind} run did not go on after {done} kills")
        runs += 1
        found = contents(folder / name)
        different += [
            f"{name}: {file}"
            for file in sorted(wanted.keys() | found.keys())
            if wanted.get(file) != found.get(file)
        ]
        if runs > 1:
            shutil.rmtree(folder / name)
    return {
        "kills": done,
        "inside_a_save": inside,
        "resumed_from": resumed,
        "runs": runs,
        "different": different,
    }


if __name__ == "__main__":
    words = dict(word.split("=") for word in sys.argv[2:] if "=" in word)
    counts = {kind: int(count) for kind, count in words.items()}
    STEPS = counts.pop("steps", STEPS)
    sys.exit(main(Path(sys.argv[1]), counts, "SIGINT" in sys.argv[2:]))
