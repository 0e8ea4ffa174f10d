"""The examples that need nothing but this package run and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys


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
