"""`make test-gpu` collects every test that needs a device, counted where there is none."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from jepa_kernels.backend import OPS
from jepa_kernels.testing import HEAD_DIMS
from jepa_kernels.testing.rollout import CELLS


@pytest.fixture(scope="module")
def collected(root) -> list[str]:
    command = re.search(
        r"^test-gpu:.*\n\t\$\(PYTEST\) (.*)$", (root / "Makefile").read_text(), re.M
    )
    options = [sys.executable, "-m", "pytest", *command[1].split(), "--collect-only", "-q"]
    options += ["-o", "addopts="]
    done = subprocess.run(options, cwd=root, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_op_is_tested_on_both_kernels(collected, root):
    for op in OPS:
        own = root / "tests" / "ops" / f"test_{op}.py"
        file = own.name if own.exists() else "test_device.py"  # rollouts of every cell
        for backend in ("cuda", "triton"):
            found = [test for test in collected if file in test and backend in test]
            assert len(found) >= 20, (op, backend, len(found))


def test_rollouts_and_float16_are_among_them(collected):
    for backend in ("cuda", "triton"):
        rollouts = [t for t in collected if "::test_rollouts[" in t and t.endswith(f"-{backend}]")]
        # Cells x outputs x dtypes.
        assert len(rollouts) == len(CELLS) * 4 * 3
        halves = [
            t for t in collected if "::test_float16_attention[" in t and t.endswith(f"-{backend}]")
        ]
        assert len(halves) == len(HEAD_DIMS)


def test_flash_is_tested_on_every_library(collected):
    from jepa_kernels.ops.masked_attention import flash

    for library in flash.LIBRARIES:
        found = [t for t in collected if "::TestFlash::" in t and library.name in t]
        assert len(found) == 2 * len(HEAD_DIMS) + 3, library.name


def test_graphs_streams_devices_and_far_addresses_are_among_them(collected):
    for name in (
        "test_a_graph_computes_anew_from_values_ids_and_lengths",
        "test_a_table_first_used_in_a_capture_does_not_reach_eager_calls",
        "test_two_side_streams_share_a_new_table",
        "test_two_devices",
        "test_compiled_calls_equal_eager_ones",
        "test_attention_beyond_2_31_elements",
        "test_capturable_steps_replay",
    ):
        assert len([t for t in collected if f"::{name}[" in t]) >= 2, name


def test_no_test_elsewhere_needs_a_device(root):
    """The target looks at one folder: others import what a rented machine may lack."""
    for path in (root / "tests").rglob("test_*.py"):
        if path.parent.name != "ops" and path.name != "test_gpu_marks.py":
            text = path.read_text()
            assert "mark.gpu" not in text, path
            assert "on_a_gpu" not in text, path
