"""Full disks, two runs in one folder, Ctrl-C: a sentence, nothing half-written, and the run goes
on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from jepa import cli, encode, finetune, pretrain
from jepa.atomic import UNFINISHED, write_json
from jepa.checkpoint import Checkpoints
from jepa.config import ConfigError
from jepa.data.build import build_dataset
from jepa.evaluation import InputSpec, cached_features, untrained_encoder
from jepa.lock import exclusive
from jepa.logs import RunLog
from tests.jepa.run_cases import tiny_run


@contextlib.contextmanager
def room_for(size: int):
    """No file may grow beyond `size` bytes: what a full disk is to a writer, without a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def unfinished(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(UNFINISHED)]


@contextlib.contextmanager
def fails_for(path):
    with pytest.raises(OSError) as error:
        yield
    assert error.value.errno == errno.EFBIG
    assert error.value.strerror == f"{path} could not be written: File too large"


def test_a_checkpoint_that_finds_no_room(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    tensors = {"weight": torch.randn(10_000)}
    checkpoints.save(1, tensors, tensors, {})
    for size in (0, 100, 20_000):
        with fails_for(checkpoints.path(2)), room_for(size):
            checkpoints.save(2, tensors, tensors, {})
        assert checkpoints.steps() == [1] and not unfinished(tmp_path)
    checkpoints.load(1)
    checkpoints.save(2, tensors, tensors, {})
    assert checkpoints.steps() == [1, 2]


def test_json_that_finds_no_room_leaves_the_old(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, [1])
    with fails_for(path), room_for(10):
        write_json(path, list(range(1000)))
    assert json.loads(path.read_text()) == [1] and not unfinished(tmp_path)


def test_features_that_find_no_room(tmp_path):
    cfg = tiny_run(tmp_path)
    dataset = build_dataset(cfg.data, "test")
    spec, encoder = InputSpec.of(cfg, "moving_shapes"), untrained_encoder(cfg)
    path = tmp_path / "features" / "a.npy"
    for size in (0, 200, 10_000):
        with fails_for(path), room_for(size):
            cached_features(encoder, dataset, spec, path, batch_size=4)
        assert not path.exists() and not unfinished(tmp_path)
    assert np.isfinite(cached_features(encoder, dataset, spec, path, batch_size=4)).all()


def test_log_lines_that_find_no_room(tmp_path):
    with fails_for(tmp_path / "log.jsonl"), room_for(5_000), RunLog(tmp_path, 0) as log:
        log._board.close()
        log._board = type("Board", (), {"add_scalar": lambda *_: None, "close": lambda _: None})()
        for step in range(1, 1000):
            log.write({"step": step, "loss": 0.5}, 1000)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_that_finds_no_room(tmp_path):
    with fails_for(tmp_path / "tensorboard"), room_for(4_000), RunLog(tmp_path, 0) as log:
        for step in range(1, 1000):
            log.write({"step": step, **{f"value{i}": 0.5 for i in range(30)}}, 1000)


def test_a_run_that_finds_no_room_goes_on_when_there_is(tmp_path):
    whole, short = tmp_path / "whole", tmp_path / "short"
    pretrain.run(tiny_run(whole, steps=2))
    with pytest.raises(OSError, match="could not be written: File too large"), room_for(30_000):
        pretrain.run(tiny_run(short, steps=2))
    assert not unfinished(tmp_path)
    pretrain.run(tiny_run(short, steps=2))
    for name in ("model", "optimizer"):
        file = f"checkpoints/step_00000002/{name}.safetensors"
        assert (whole / file).read_bytes() == (short / file).read_bytes()


def test_encoding_that_finds_no_room_goes_on_when_there_is(tmp_path):
    from PIL import Image

    pretrain.run(tiny_run(tmp_path / "run", steps=1))
    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / "in" / f"{name}.png")
    cfg = encode.EncodeConfig(tmp_path / "in", tmp_path / "out", run=tmp_path / "run", threads=1)
    with fails_for(tmp_path / "out" / "a.png.safetensors"), room_for(300):
        encode.run(cfg)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert encode.run(cfg) == (2, 0)


HOLDER = """
import sys, time
from pathlib import Path
from jepa.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held_elsewhere(folder, root):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        child.kill()
        child.wait()


def test_two_runs_in_one_folder_are_refused(tmp_path, root):
    run_folder = tmp_path / "run"
    pretrain.run(tiny_run(run_folder, steps=1))
    before = sorted(path.name for path in run_folder.iterdir())
    with held_elsewhere(run_folder, root) as child:
        sentence = rf"no other run uses, got .*, where process {child.pid} is at work\.$"
        with pytest.raises(ConfigError, match=sentence):
            pretrain.run(tiny_run(run_folder, steps=2))
        assert sorted(path.name for path in run_folder.iterdir()) == before
        with held_elsewhere(run_folder / "finetune", root), pytest.raises(ConfigError):
            finetune.run(finetune.FinetuneConfig(run=run_folder))
        with held_elsewhere(tmp_path / "out", root), pytest.raises(ConfigError):
            (tmp_path / "list.txt").write_text("a.mp4\n")
            encode.run(encode.EncodeConfig(tmp_path / "list.txt", tmp_path / "out", run=run_folder))
        child.send_signal(signal.SIGKILL)
        child.wait()
        # The lock died with its process.
        assert pretrain.run(tiny_run(run_folder, steps=2)).step == 2


def test_workers_do_not_inherit_the_lock(tmp_path, root):
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom jepa.lock import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n        time.sleep(5)\n        os._exit(0)\n"
        "    os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=True)
    with exclusive(tmp_path):
        pass


def test_a_waiting_process_gets_its_turn(tmp_path, root):
    with held_elsewhere(tmp_path, root) as child:
        os.kill(child.pid, signal.SIGSTOP)
        began = time.monotonic()
        os.kill(child.pid, signal.SIGKILL)
        with exclusive(tmp_path, wait=True):
            assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            KeyboardInterrupt(),
            130,
            "interrupted: the same command goes on from what was saved last.",
        ),
        (
            OSError(28, "x could not be written: No space left on device"),
            2,
            "x could not be written: No space left on device",
        ),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (ConfigError("config: a must b."), 2, "config: a must b."),
    ],
)
def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys, error, status, said):
    def fails(cfg):
        raise error

    monkeypatch.setattr(pretrain, "run", fails)
    assert cli.main(["pretrain", f"output={tmp_path}"]) == status
    assert capsys.readouterr().err == said + "\n"


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "run", lambda cfg: {}["fault"])
    with pytest.raises(KeyError):
        cli.main(["pretrain", f"output={tmp_path}"])


def test_an_interrupt_inside_tensorboards_queue_costs_seconds(tmp_path):
    """Between an entry of the queue and the call that wakes its reader: closing then waits for the
    reader to wake by itself."""

    def interrupted():
        del queue.not_empty.notify
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path, 0) as log:
        log.write({"step": 1, "loss": 0.5}, 3)
        time.sleep(0.2)  # the reader has written, and waits
        queue = log._board.file_writer.event_writer._async_writer._byte_queue
        queue.not_empty.notify = interrupted
        began = time.monotonic()
        log.write({"step": 2, "loss": 0.5}, 3)
    assert time.monotonic() - began < 20
