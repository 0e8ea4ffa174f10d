"""The CPU kernels of ema_update and adamw_ema under sanitizers, for every instruction set this
machine has."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.native.build import Unit, library, units
from tests.simt.build import _FLAGS, ROOT, SANITIZER_STATUS, run_sanitized

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="the sanitized build names x86-64 instruction sets",
)
SCRIPT = str(ROOT / "tests" / "native" / "list_sanitized.py")
PARALLEL = Unit(Path(__file__).with_name("list_parallel.cpp"), "", [])


def build(folder: Path, sanitizer: str) -> str:
    parts = [*units("ema_update"), *units("adamw_ema"), PARALLEL]
    return str(library("lists", folder, parts, lambda unit: _FLAGS[sanitizer], _FLAGS[sanitizer]))


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    path = build(tmp_path, sanitizer)
    done = run_sanitized([SCRIPT, path], sanitizer)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if sanitizer == "tsan":
        # The same run with pieces that overlap, or finding nothing would prove nothing.
        assert run_sanitized([SCRIPT, path, "overlap"], sanitizer).returncode == SANITIZER_STATUS
