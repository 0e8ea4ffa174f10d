"""The CPU kernels of ema_update and adamw_ema under sanitizers, for every instruction set this
machine has."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from tests.simt.build import _FLAGS, ROOT, SANITIZER_STATUS, compiler, run_sanitized

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="the sanitized build names x86-64 instruction sets",
)
SCRIPT = str(ROOT / "tests" / "native" / "list_sanitized.py")
SOURCES = tuple(
    ROOT / "csrc" / op / "cpu" / f"{name}.cpp"
    for op in ("ema_update", "adamw_ema")
    for name in ("launch", "avx2")
)


def build(folder: Path, sanitizer: str) -> str:
    objects = []
    for source in (*SOURCES, Path(__file__).with_name("list_parallel.cpp")):
        isa = ["-mavx2", "-mfma", "-mf16c"] if source.stem == "avx2" else []
        objects.append(str(folder / f"{source.parents[1].name}-{source.stem}.o"))
        subprocess.run(
            [
                compiler(),
                "-std=c++20",
                "-fPIC",
                *_FLAGS[sanitizer],
                *isa,
                "-c",
                str(source),
                "-o",
                objects[-1],
            ],
            check=True,
        )
    library = str(folder / "list_kernels.so")
    subprocess.run([compiler(), "-shared", *_FLAGS[sanitizer], *objects, "-o", library], check=True)
    return library


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    library = build(tmp_path, sanitizer)
    done = run_sanitized([SCRIPT, library], sanitizer)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if sanitizer == "tsan":
        # The same run with pieces that overlap, or finding nothing would prove nothing.
        assert run_sanitized([SCRIPT, library, "overlap"], sanitizer).returncode == SANITIZER_STATUS
