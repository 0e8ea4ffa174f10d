"""Checkpoints are whole or absent, never executed, and resuming from one changes nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from jepa import checkpoint, pretrain
from jepa.checkpoint import (
    CheckpointError,
    Checkpoints,
    load,
    load_model,
    load_model_tensors,
    load_optimizer_tensors,
    optimizer_tensors,
)
from tests.jepa.run_cases import tiny_run


def small(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(3, 4, generator=generator)}, {
        "exp_avg/weight": torch.randn(3, 4, generator=generator)
    }


def folder_with(tmp_path: Path, step: int = 1, **state) -> Path:
    return Checkpoints(tmp_path).save(step, *small(), {"config": {}, **state})


def test_a_save_is_read_back_unchanged(tmp_path):
    model, moments = small()
    shared = {**model, "again": model["weight"]}
    path = Checkpoints(tmp_path).save(7, shared, moments, {"config": {"seed": 3}})
    loaded, loaded_moments, state = load(path)
    assert loaded.keys() == shared.keys()
    assert torch.equal(loaded["again"], model["weight"])
    assert torch.equal(loaded_moments["exp_avg/weight"], moments["exp_avg/weight"])
    assert (state["step"], state["config"]) == (7, {"seed": 3})
    assert torch.equal(load_model(path)[0]["weight"], model["weight"])


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step, score in enumerate([3.0, 1.0, 2.0, float("nan"), 1.0, None, 4.0], start=1):
        checkpoints.save(step, *small(step), {}, score)
    assert checkpoints.steps() == [2, 6, 7]
    assert checkpoints.best() == (2, 1.0)
    assert torch.equal(checkpoints.load()[0]["weight"], small(7)[0]["weight"])
    assert not list(tmp_path.glob(".writing-*"))


def test_what_a_killed_save_left_is_no_checkpoint_and_is_swept(tmp_path):
    folder_with(tmp_path, 1)
    left = tmp_path / ".writing-99-00000002"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert Checkpoints(tmp_path).steps() == [1]
    folder_with(tmp_path, 3)
    assert not left.exists()


def test_a_run_killed_in_its_last_save_ends_it_when_started_again(tmp_path):
    """It saves nothing more, so nothing but its start could."""
    cfg = tiny_run(tmp_path, steps=3, keep_last=1)
    pretrain.run(cfg)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    kept = checkpoints.steps()
    shutil.copytree(checkpoints.path(kept[-1]), checkpoints.folder / ".writing-99-old-00000001")
    early = next(step for step in (1, 2) if step not in kept)
    shutil.copytree(checkpoints.path(kept[-1]), checkpoints.path(early))
    worse = checkpoints.path(early) / "state.json"
    worse.write_text(json.dumps({**json.loads(worse.read_text()), "score": 1e9}))
    pretrain.run(cfg)
    assert sorted(entry.name for entry in checkpoints.folder.iterdir()) == [
        checkpoints.path(step).name for step in kept
    ]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("place", [0, 20, -1], ids=["length", "header", "data"])
def test_one_flipped_bit_is_refused(tmp_path, file, place):
    path = folder_with(tmp_path)
    flip(path / file, place)
    with pytest.raises(CheckpointError, match=rf"^checkpoint: \S+{file} must .*, got .*\.$"):
        load(path)


def test_cut_missing_and_foreign_files_are_refused(tmp_path):
    path = folder_with(tmp_path)
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors must"):
        load(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        load(path)
    state = path / "state.json"
    for text, expected in (
        ("{", "must be the JSON"),
        ("[]", "must be of format 1, got 'list'"),
        ('{"format": 9}', "got 9"),
        ('{"format": 1}', "step"),
    ):
        state.write_text(text)
        with pytest.raises(CheckpointError, match=expected):
            load(path)
    with pytest.raises(CheckpointError, match="must hold a checkpoint, got none"):
        Checkpoints(tmp_path / "empty").load()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_loading_never_unpickles(tmp_path):
    path, marker = folder_with(tmp_path), tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # the bomb works
    marker.rmdir()
    for name in ("model", "optimizer"):
        (path / f"{name}.safetensors").write_bytes(pickle.dumps(Bomb(marker)))
        state = json.loads((path / "state.json").read_text())
        state["sha256"][name] = checkpoint._digest(path / f"{name}.safetensors")
        (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="SafetensorError"):
        load(path)
    assert not marker.exists()


def test_tensors_that_do_not_fit_are_refused_by_name():
    model = nn.Linear(4, 3)
    whole = {"weight": torch.zeros(3, 4), "bias": torch.ones(3)}
    load_model_tensors(model, whole)
    assert torch.equal(model.bias, torch.ones(3))
    for tensors, expected in (
        ({"weight": whole["weight"]}, "should have bias"),
        ({**whole, "scale": torch.ones(1)}, "should not have scale"),
        ({**whole, "bias": torch.ones(4)}, "should have other shapes for bias"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            load_model_tensors(model, tensors)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with pytest.raises(CheckpointError, match="got 'scale'"):
        load_optimizer_tensors(model, optimizer, {"exp_avg/scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"of shape \(3,\), got \(4,\)"):
        load_optimizer_tensors(model, optimizer, {"exp_avg/bias": torch.ones(4)})


def test_optimizer_moments_survive(tmp_path):
    def trained(steps: int, restored: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        for step in range(steps):
            if step == 2 and restored:
                path = Checkpoints(tmp_path).save(
                    2, model.state_dict(), optimizer_tensors(model, optimizer), {}
                )
                model = nn.Linear(4, 3)
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
                tensors, moments, _ = load(path)
                load_model_tensors(model, tensors)
                load_optimizer_tensors(model, optimizer, moments)
            model(torch.full((2, 4), float(step + 1))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach()

    assert torch.equal(trained(4, False), trained(4, True))


def test_another_environment_is_warned_of(caplog):
    same = checkpoint.environment()
    assert checkpoint.warn_of_differences(same) == []
    found = checkpoint.warn_of_differences({**same, "threads": 99, "torch": "1.0"})
    assert len(found) == 2
    assert "threads 99 then" in caplog.text


def killed(folder: Path, root: Path, *words: str) -> dict[str, dict]:
    """Kills at random moments of runs that save at every step (killed_runs.py), compared file by
    file with ones that were left alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.jepa.killed_runs", str(folder), *words]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_forty_kills_change_nothing(tmp_path, root):
    kills = {"pretrain": 16, "finetune": 8, "probe": 6, "encode": 10}
    reports = killed(tmp_path, root, *(f"{kind}={count}" for kind, count in kills.items()))
    for kind, count in kills.items():
        report = reports[kind]
        assert report["kills"] == count
        assert report["different"] == []
        assert report["resumed_from"] == sorted(report["resumed_from"]) or report["runs"] > 1
        folder = tmp_path / kind
        if kind in ("pretrain", "finetune"):
            (first,), (second,) = (
                list((folder / name).rglob("checkpoints")) for name in ("whole", "killed")
            )
            assert Checkpoints(first).steps() == Checkpoints(second).steps()
            assert Checkpoints(first).best() == Checkpoints(second).best()
    assert sum(report["inside_a_save"] for report in reports.values()) >= 1
    whole, survivor = (tmp_path / "pretrain" / name / "log.jsonl" for name in ("whole", "killed"))
    assert _lines(whole) == _lines(survivor)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_interrupted_runs_leave_nothing_unfinished(tmp_path, root):
    kills = {"pretrain": 3, "finetune": 2, "encode": 2}
    words = ["steps=8", *(f"{kind}={count}" for kind, count in kills.items())]
    for kind, report in killed(tmp_path, root, "SIGINT", *words).items():
        assert report["kills"] == kills[kind]
        assert report["different"] == []


def _lines(path: Path) -> list[dict]:
    """Log lines without what depends on the clock."""
    clock = ("clips_per_s", "data_wait_share")
    return [
        {k: v for k, v in json.loads(line).items() if k not in clock}
        for line in path.read_text().splitlines()
    ]
