"""Fixtures of the CPU kernels' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import missing


@pytest.fixture(scope="session")
def emulated_builds(pytestconfig) -> Path:
    """Where builds with an emulation of AVX-512 are kept between runs."""
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        missing("the SIMDe headers are not installed (apt-get install libsimde-dev)")
    return Path(pytestconfig.cache.mkdir("native_kernels"))


@pytest.fixture
def one_thread():
    """The shapes are tiny: torch's threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
