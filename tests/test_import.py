"""What importing does and does not do, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run(code: str, **env: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_import_is_quick_and_touches_neither_triton_nor_a_compiler():
    """Under a second beyond torch's own import, even on a busy machine: CPU time is what is
    measured."""
    out = run(
        """
        import sys, time, torch
        import subprocess
        subprocess.Popen = None  # any attempt to start a compiler fails loudly
        before = time.process_time()
        import jepa_kernels
        imported = sys.modules.get("triton") is not None and "triton.language" in sys.modules
        assert not imported, "triton was imported"
        assert "jepa" not in sys.modules and "av" not in sys.modules
        print(time.process_time() - before)
        """
    )
    assert float(out) < 1.0


def test_import_works_with_triton_cuda_and_the_native_library_absent(tmp_path, root):
    """A copy of the package without its compiled files, in a process where importing triton
    raises."""
    import shutil

    shutil.copytree(
        root / "jepa_kernels",
        tmp_path / "jepa_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    out = run(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        sys.modules["triton"] = None
        import torch, jepa_kernels
        from pathlib import Path
        assert Path(jepa_kernels.__file__).is_relative_to({str(tmp_path)!r}), jepa_kernels.__file__
        x = torch.randn(1, 4, 2, 8)
        assert jepa_kernels.masked_attention(x, x, x).shape == x.shape
        try:
            jepa_kernels.masked_attention(x, x, x, backend="cpu")
        except jepa_kernels.BackendUnsupportedError as error:
            print(error)
        from jepa_kernels.__main__ import report
        print(report())
        """
    )
    assert (
        "the native library is not built (build it with: pip install -e . --no-build-isolation)"
        in out
    )
    assert "CPU kernels    missing" in out


def test_no_path_of_this_machine_in_the_package(root: Path):
    """The project speaks of itself alone."""
    for folder in ("jepa_kernels", "jepa", "csrc", "benchmarks", "tests", "docs", "examples"):
        for path in (root / folder).rglob("*"):
            if path.suffix in (
                ".py",
                ".cpp",
                ".h",
                ".cu",
                ".cuh",
                ".md",
                ".json",
                ".html",
                ".toml",
                ".yaml",
            ):
                text = path.read_text(encoding="utf-8", errors="replace")
                for word in ("/wo" + "rk/", "/ro" + "ot/", "pypi" + "-more", "farm" + "-"):
                    assert word not in text, f"{path.relative_to(root)} names {word!r}"
