"""Run by test_checkpoint.py in a process of its own: kills a run again and again, then lets it
finish.

    python -m tests.jepa.killed_runs FOLDER KILLS pretrain|finetune

Every attempt is a fork of this process, which has imported everything and started no thread, so
that an attempt costs no start-up. Prints {"kills", "inside_a_save", "resumed_from"} as JSON. The
caller compares FOLDER/killed with FOLDER/whole.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.utils.tensorboard  # imported once here instead of in every attempt

from jepa import finetune, pretrain
from jepa.checkpoint import Checkpoints
from jepa.data.build import DataConfig
from jepa.step import loss_step, new_state
from tests.jepa.run_cases import tiny_run
from tests.jepa.training_cases import make_batch

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
    for module, name in ((pretrain, "train_step"), (finetune, "logits_of")):
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


def main(folder: Path, kills: int, kind: str) -> int:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    warm_up()
    if kind == "finetune" and not ended_well(
        *attempt(lambda: pretrain.run(tiny_run(folder / "run", steps=1, name="fwm_hw_ld")))
    ):
        return 1
    made = {"pretrain": pretraining, "finetune": finetuning}[kind]
    whole, _ = made(folder / "whole")
    work, place = made(folder / "killed")
    child, reader = attempt(whole)
    os.read(reader, 1)
    began = time.perf_counter()
    os.waitpid(child, 0)
    duration = time.perf_counter() - began
    rng = random.Random(0)
    checkpoints = Checkpoints(place)
    done = inside = 0
    resumed = []
    while done < kills:
        child, reader = attempt(work)
        os.read(reader, 1)
        # Two steps and saves or less; an attempt that is killed in its first step makes no
        # progress.
        time.sleep(rng.uniform(0.0, 2 / STEPS * duration))
        os.kill(child, signal.SIGKILL)
        if ended_well(child, reader):
            break
        done += 1
        inside += any(checkpoints.folder.glob(".writing-*"))
        for step in checkpoints.steps():
            checkpoints.load(step)
        resumed.append(max(checkpoints.steps(), default=0))
    if not ended_well(*attempt(work)):
        return 1
    print(json.dumps({"kills": done, "inside_a_save": inside, "resumed_from": resumed}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
