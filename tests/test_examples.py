"""The examples that need nothing but this package run and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from jepa_kernels.testing import FLOAT32_DEEP


def test_plan_with_gru(root):
    script = [
        sys.executable,
        "examples/plan_with_gru.py",
        "--training-steps",
        "150",
        "--tasks",
        "3",
        "--rounds",
        "5",
    ]
    # The tensors are too small to share among threads, which on a busy machine only wait for one
    # another.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        script, cwd=root, env=environment, capture_output=True, text=True, timeout=240
    )
    assert child.returncode == 0, child.stderr
    planned, chance = (
        float(re.search(rf"{name}[a-z ]*(\d+\.\d+)", child.stdout)[1])
        for name in ("planned: ends", "random actions: ")
    )
    assert planned < 0.5 * chance, child.stdout


def test_plan_with_ac(root):
    """Small: the same plan with and without the cache, in less time, and nearer to the goal."""
    sizes = {
        "pretraining-steps": 8,
        "trajectories": 96,
        "shapes": 1,
        "training-steps": 120,
        "tasks": 3,
        "rounds": 4,
    }
    script = [sys.executable, "examples/plan_with_ac.py"]
    script += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        script, cwd=root, env=environment, capture_output=True, text=True, timeout=240
    )
    assert child.returncode == 0, child.stderr
    planned, chance, ratio, apart = (
        float(re.search(pattern, child.stdout)[1])
        for pattern in (
            r"planned: ends (\S+)",
            r"random actions: (\S+)",
            r"(\S+) times as long",
            r"differ by at most (\S+)",
        )
    )
    assert planned < 0.75 * chance, child.stdout
    assert ratio > 1.5, child.stdout
    assert apart < FLOAT32_DEEP["atol"], child.stdout
