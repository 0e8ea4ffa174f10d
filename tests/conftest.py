"""Shared by every test: seeds, NaN-poisoned allocations, no calibration, the folder of shared data,
and a list of what was not exercised."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# What this user has calibrated must not choose backends here, nor in child processes. Set before
# jepa_kernels, which reads the file at import.
_NO_CALIBRATION = tempfile.TemporaryDirectory(prefix="jepa_kernels_tests_")
os.environ["JEPA_KERNELS_CACHE"] = _NO_CALIBRATION.name
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")


def missing(what: str) -> None:
    """Skips with a sentence; in CI, where everything must be present, fails with it."""
    if IN_CI:
        pytest.fail(f"{what} (CI must have it)")
    pytest.skip(what)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of golden numbers and clips beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        missing("the shared folder with golden numbers and clips is not beside the checkout")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (peers under test use the global generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_allocations():
    """torch.empty gives NaN (integers: a large value), C++ allocations included, so that an element
    that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Without a CUDA device, tests marked `gpu` are left out, or skipped by name where -m asks for
    them."""
    if torch.cuda.is_available():
        return
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if "gpu" in (config.option.markexpr or ""):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
        return
    items[:] = [item for item in items if item not in set(marked)]
    config.hook.pytest_deselected(items=marked)


def pytest_terminal_summary(terminalreporter) -> None:
    """Which backends this run did not exercise, and why."""
    import jepa_kernels

    gpu = torch.cuda.is_available()
    lines = [f"jepa_kernels {jepa_kernels.__version__}, torch {torch.__version__}"]
    if not gpu:
        lines.append(
            "not exercised: cuda and triton on a device (no GPU here; their sources run in "
            "tests/simt and tests/interpret)"
        )
    if not jepa_kernels.native.available():
        lines.append(f"not exercised: cpu ({jepa_kernels.native.reason()})")
    for line in lines:
        terminalreporter.write_line(line)
