"""Every op's room is complete: files, tests, benchmark, docstring sections. A new op that lacks one
turns this red."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import jepa_kernels
from jepa_kernels.backend import BACKENDS, ROOMS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(
    p.name for p in (ROOT / "jepa_kernels" / "ops").iterdir() if (p / "api.py").exists()
)
# What a room is known to lack, so that it is neither hidden nor forgotten: an entry that is there
# after all fails too.
PENDING: dict[str, set[str]] = {}
each_op = pytest.mark.parametrize("op", FOLDERS)


def public(op: str):
    for name in (op, f"{op}_"):
        if hasattr(jepa_kernels, name):
            return getattr(jepa_kernels, name)
    pytest.fail(f"jepa_kernels exports neither {op} nor {op}_")


def test_every_room_is_registered():
    assert sorted(ROOMS) == FOLDERS


@each_op
def test_a_room_has_its_files(op):
    room = ROOMS[op]
    assert set(room.priority) <= set(BACKENDS)
    lacking = {f"backend {name}" for name in set(BACKENDS) - set(room.priority)}
    always = [
        f"jepa_kernels/ops/{op}/{name}.py"
        for name in ("__init__", "api", "op", "reference", *room.priority)
    ]
    native = [
        f"csrc/{op}/{name}"
        for name in ("params.h", "binding.cpp", "cpu/launch.cpp", "cuda/launch.cu")
    ]
    tests = [
        f"tests/ops/test_{op}.py",
        f"tests/ops/fuzz_{op}.py",
        f"benchmarks/bench_{op}.py",
        f"tests/golden/{op}.json",
    ]
    patterns = [f"tests/simt/test_{op}*.py", f"tests/interpret/test_{op}*.py"]
    lacking |= {path for path in (*always, *native, *tests, *patterns) if not list(ROOT.glob(path))}
    pending = PENDING.get(op, set())
    assert not lacking - pending, f"the room lacks {sorted(lacking - pending)}"
    assert not pending - lacking, f"no longer pending: {sorted(pending - lacking)}"


@each_op
def test_backends_answer_and_do_not_import_one_another(op):
    room = ROOMS[op]
    for name in room.priority:
        module = room.modules[name]
        assert callable(module.unsupported_reasons)
        source = inspect.getsource(module)
        for other in (*BACKENDS, "reference"):
            if other != name and other != "torch":
                assert f"from .{other} import" not in source, f"{name} imports {other}"
                assert f"from . import {other}" not in source, f"{name} imports {other}"


@each_op
def test_the_public_docstring_keeps_its_sections(op):
    text = inspect.getdoc(public(op)) or ""
    for section in ("Args:", "Returns:", "Raises:", "Notes:", "Example:"):
        assert section in text, f"{op}: the docstring lacks {section}"
    assert "arXiv" in text or "paper" in text.lower(), f"{op}: the docstring names no source"
    assert len(inspect.signature(public(op)).parameters) <= 12


@pytest.mark.parametrize(
    "name", [n for n in jepa_kernels.__all__ if callable(getattr(jepa_kernels, n))]
)
def test_public_names_are_documented_and_their_examples_run(name):
    import doctest

    value = getattr(jepa_kernels, name)
    assert inspect.getdoc(value), name
    module = importlib.import_module(value.__module__)
    results = [
        doctest.DocTestRunner(verbose=False).run(t)
        for t in doctest.DocTestFinder().find(value, name, module=module)
    ]
    assert not sum(r.failed for r in results), f"the example of {name} fails"
