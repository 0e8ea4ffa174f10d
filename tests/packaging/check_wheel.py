"""One wheel serves every torch: builds and installs the package in each way a user would, in fresh
environments.

    python -m tests.packaging.check_wheel --torch torch==2.14.1

1. `pip wheel . --no-build-isolation`; the wheel goes into a second environment with another torch,
   and is used there with no compiler on PATH.
2. `pip install .` with build isolation, `pip install -e . --no-build-isolation`, and
   `uv pip install .`, in environments that share this one's torch.
3. Where something is missing: no compiler, no writable home, a pip of 2021, Python 3.10.
4. An sdist builds and holds the native sources.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch

from release.environments import ROOT, fresh, interpreter, run, smoke

# Not one that root could make.
NO_HOME = "/proc/nobody"
BUILD = {**os.environ, "JEPA_KERNELS_CUDA": "0"}
INSTALL = ("-m", "pip", "install", "--quiet", "--no-deps")


def build_wheel(folder: Path) -> Path:
    out = folder / "wheels"
    command = (sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps")
    run(*command, "--quiet", "-w", out, cwd=ROOT)
    (wheel,) = out.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("jepa_kernels/_native.so", "jepa_kernels/py.typed", "jepa_kernels/_host", "jepa/"):
        assert any(n.startswith(part) for n in names), f"the wheel lacks {part}"
    developed = ("tests", "benchmarks", "csrc", "release")
    assert not any(n.startswith(developed) for n in names), "the wheel holds development files"
    return wheel


def check_sdist(folder: Path) -> None:
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder / "sdist", cwd=ROOT)
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = [Path(*Path(m).parts[1:]).as_posix() for m in archive.getnames()]
    for source in (
        "csrc/registration.cpp",
        "csrc/abi.h",
        "csrc/cuda/device.cuh",
        "csrc/masked_attention/cuda/launch.cu",
        "LICENSE",
        "setup.py",
    ):
        assert source in held, f"the sdist lacks {source}"


def isolated(folder: Path) -> None:
    python = fresh(folder / "isolated", share_torch=True)
    run(python, *INSTALL, ROOT, cwd=folder, env=BUILD)
    smoke(python, folder, "installed")


def editable(folder: Path) -> None:
    python = fresh(folder / "editable", share_torch=True)
    run(python, "-m", "pip", "install", "--quiet", "setuptools>=77", "wheel", "pybind11", "ninja")
    copy = folder / "copy"
    run("git", "clone", "--quiet", ROOT, copy)
    run(python, *INSTALL, "--no-build-isolation", "-e", copy, cwd=folder, env=BUILD)
    smoke(python, folder, "editable")


def with_uv(folder: Path) -> None:
    """uv hides the environment from the build, which is told where torch is."""
    python = fresh(folder / "uv", share_torch=True)
    run(python, "-m", "pip", "install", "--quiet", "uv")
    install = (python.parent / "uv", "pip", "install", "--quiet", "--no-deps", "--python", python)
    told = subprocess.run(
        [str(word) for word in (*install, ROOT)], env=BUILD, capture_output=True, text=True
    )
    assert told.returncode != 0 and "JEPA_KERNELS_TORCH=" in told.stderr, told.stderr
    run(*install, ROOT, cwd=folder, env={**BUILD, "JEPA_KERNELS_TORCH": torch.__path__[0]})
    smoke(python, folder, "installed")


def without_a_compiler(folder: Path) -> None:
    """Nor a home that could be written: the pure-Python package, and doctor says why."""
    python = fresh(folder / "pure", share_torch=True)
    # A pip of its own process still finds what it calls; no compiler is among that.
    bare = {k: v for k, v in BUILD.items() if k not in ("CXX", "PYTHONPATH")}
    bare |= {"PATH": "/nonexistent", "HOME": NO_HOME}
    run(python, *INSTALL, ROOT, cwd=folder, env=bare)
    command = [str(python), "-m", "jepa_kernels", "doctor"]
    said = subprocess.run(command, cwd=folder, env=bare, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "there is no C++ compiler (install g++" in said.stdout, said.stdout
    assert "torch yes  reference yes" in said.stdout, said.stdout


def with_an_old_pip(folder: Path) -> None:
    python = fresh(folder / "old", share_torch=True)
    run(python, "-m", "pip", "install", "--quiet", "pip==21.3.1")
    run(python, *INSTALL, ROOT, cwd=folder, env={**BUILD, "JEPA_KERNELS_NATIVE": "0"})
    run(python, "-c", "import jepa_kernels", cwd=folder)


def with_python_3_10(folder: Path) -> None:
    base = interpreter("3.10")
    if base is None:
        print("Python 3.10 is not here; that it is refused was not seen")
        return
    python = fresh(folder / "3.10", base=base)
    told = subprocess.run(
        [str(word) for word in (python, *INSTALL, ROOT)], env=BUILD, capture_output=True, text=True
    )
    assert told.returncode != 0 and "requires a different Python" in told.stderr, told.stderr


WAYS = {
    "isolated": isolated,
    "editable": editable,
    "uv": with_uv,
    "without-a-compiler": without_a_compiler,
    "old-pip": with_an_old_pip,
    "python-3.10": with_python_3_10,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch", default="torch==2.14.1", help="requirement of the second environment"
    )
    parser.add_argument(
        "--skip-other-torch",
        action="store_true",
        help="leave out the environment that installs another torch",
    )
    parser.add_argument("--only", nargs="+", choices=WAYS, help="these ways alone, and no wheel")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for way in chosen.only or WAYS:
            WAYS[way](folder)
        if chosen.only:
            return
        check_sdist(folder)
        wheel = build_wheel(folder)
        if not chosen.skip_other_torch:
            other = fresh(folder / "other")
            run(other, "-m", "pip", "install", "--quiet", chosen.torch, "numpy")
            run(other, *INSTALL, wheel)
            smoke(other, folder, "installed")
    print("every way of installing works")


if __name__ == "__main__":
    main()
