"""Tolerances live in jepa_kernels/testing.py: a test that spells a number of its own is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SPELLED = re.compile(r"\b(?:rtol|atol)=\s*[\d.]")
FOLDERS = ("benchmarks", "integrations", "jepa", "nn")
# Not yet moved to testing.py.
OPEN = ("test_conformance.py", "test_eager_twin.py")


def files() -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((TESTS / folder).rglob("*.py"))]
    return [path for path in [*found, *sorted(TESTS.glob("test_*.py"))] if path.name not in OPEN]


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_no_test_spells_a_tolerance(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if SPELLED.search(line)]


def test_a_spelled_tolerance_is_seen():
    assert SPELLED.search("assert_close(a, b, r" + "tol=1e-5)")
    assert not SPELLED.search("assert_close(a, b, **FLOAT32)")
