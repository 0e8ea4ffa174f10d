"""README says what the code and the records say, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys


def test_generated_parts_are_current(root):
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.readme", "--check"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr


def test_the_example_runs(root):
    (example,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line and not line.startswith("#")]) <= 10
    child = subprocess.run(
        [sys.executable, "-c", example], cwd=root, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert "torch.Size([470, 6, 64])" in child.stdout


def test_make_targets_named_in_the_readme_exist(root):
    named = set(
        re.findall(
            r"\bmake ([a-z-]+)",
            (root / "README.md").read_text() + (root / "CONTRIBUTING.md").read_text(),
        )
    )
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets
