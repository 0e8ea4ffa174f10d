"""Thousands of malformed calls per op, each op in a child process, so that a signal is a failure
and not the end of the suite."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

OPS = sorted(p.stem.removeprefix("fuzz_") for p in Path(__file__).parent.glob("fuzz_*.py"))


@pytest.mark.parametrize("op", OPS)
def test_malformed_calls_are_refused(op, root):
    calls = 5000
    child = subprocess.run(
        [sys.executable, "-m", f"tests.ops.fuzz_{op}", str(calls), "0"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=280,
    )
    last = child.stderr.strip().splitlines()[-1:] if child.stderr else []
    assert child.returncode == 0, (
        f"status {child.returncode}, last call {last}, {child.stdout[-2000:]}"
    )
    done = json.loads(child.stdout.splitlines()[-1])
    assert sum(done.values()) == calls
    assert sum(count for way, count in done.items() if way != "public") >= calls // 2
