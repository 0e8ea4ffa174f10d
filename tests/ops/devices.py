"""Parameters of tests that need a CUDA device: collected everywhere, so that they can be counted,
and run where there is one."""

from __future__ import annotations

from typing import Any

import pytest

GPU_BACKENDS = ("cuda", "triton")


def on_a_gpu(*values: Any, id: str | None = None) -> Any:
    """A parameter set whose test is marked `gpu`."""
    return pytest.param(*values, marks=pytest.mark.gpu, id=id)
