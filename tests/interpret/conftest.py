"""Runs Triton kernels under its interpreter: TRITON_INTERPRET must be set before triton is first
imported, so in a process of its own.

`pytest tests/interpret` sets it; a run that also collects other tests must not (they would see
other kernels), and skips these.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from jepa_kernels import triton_runtime
from tests.conftest import missing

_HERE = Path(__file__).resolve().parent
_OWN_PROCESS = "the Triton interpreter needs a process of its own: run make test-interpret"


def pytest_configure(config) -> None:
    alone = all(
        Path(argument.split("::")[0]).resolve().is_relative_to(_HERE) for argument in config.args
    )
    if alone and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if not triton_runtime.installed():
        missing("triton is not installed (pip install triton)")
    from jepa_kernels.triton_support import INTERPRET

    if not INTERPRET.value:
        missing(_OWN_PROCESS)
    _patch_once(monkeypatch)


def _patch_once(monkeypatch) -> None:
    """The interpreter patches triton.language again for every device function a kernel calls: a
    third of the time, and no effect."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    class Scope:
        def __init__(self, inner) -> None:
            self.inner = inner

        def restore(self) -> None:
            done.clear()
            self.inner.restore()

    def patch_once(function):
        # What is patched depends on which of the two names of the language the function's module
        # uses.
        names = frozenset(
            id(value) for value in function.__globals__.values() if value is tl or value is tl.core
        )
        if names in done:
            return None
        done.add(names)
        return Scope(patch(function))

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
