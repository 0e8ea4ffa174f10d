"""Runs Triton kernels under its interpreter: TRITON_INTERPRET must be set before triton is first imported, so in a process of its own."""

from __future__ import annotations

import os
import sys

import pytest

from tests.conftest import IN_CI

_REASON = None
if os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        _REASON = "triton is already imported without its interpreter: run these in their own process, with `make test-interpret`"
    else:
        os.environ["TRITON_INTERPRET"] = "1"
if _REASON is None:
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        _REASON = "triton is not installed (pip install triton)"


def pytest_collection_modifyitems(items) -> None:
    if _REASON is None:
        return
    for item in items:
        if "tests/interpret/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=_REASON))


def pytest_runtest_setup(item) -> None:
    if _REASON is not None and IN_CI and "tests/interpret/" in item.path.as_posix():
        pytest.fail(f"{_REASON} (CI must run them)")


@pytest.fixture(autouse=True)
def _patched_once(monkeypatch):
    """The interpreter patches triton.language again for every device function a kernel calls: a third of the time, and no effect."""
    patch, done = interpreter._patch_lang, set()

    class Scope:
        def __init__(self, inner) -> None:
            self.inner = inner

        def restore(self) -> None:
            done.clear()
            self.inner.restore()

    def patch_once(function):
        # What is patched depends on which of the two names of the language the function's module uses.
        names = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if names in done:
            return None
        done.add(names)
        return Scope(patch(function))

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
