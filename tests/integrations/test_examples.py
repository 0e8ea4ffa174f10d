"""The fine-tuning example runs on real videos, and what it saves loads."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.integrations.peers import peer


@pytest.mark.slow
def test_finetune_vjepa2_transformers(root, shared_dir, tmp_path):
    peer("transformers", "transformers.models.vjepa2.modeling_vjepa2")
    script = [
        sys.executable,
        "examples/finetune_vjepa2_transformers.py",
        str(shared_dir / "clips" / "ucf101" / "videos"),
    ]
    first = [*script, "--steps", "3", "--batch-size", "2", "--save", str(tmp_path / "model")]
    child = subprocess.run(first, cwd=root, capture_output=True, text=True, timeout=200)
    assert child.returncode == 0, child.stderr
    assert "transformers-vjepa2: fused" in child.stdout
    assert len(re.findall(r"loss \d+\.\d+", child.stdout)) == 3
    again = [*script, "--steps", "1", "--batch-size", "1", "--weights", str(tmp_path / "model")]
    child = subprocess.run(again, cwd=root, capture_output=True, text=True, timeout=200)
    assert child.returncode == 0, child.stderr
