"""One wheel serves every torch: builds and installs the package in each way a user would, in fresh
environments.

    python -m tests.packaging.check_wheel --torch torch==2.14.1

1. `pip wheel . --no-build-isolation`; the wheel goes into a second environment with another torch,
   and is used there with no compiler on PATH.
2. `pip install .` with build isolation, and `pip install -e . --no-build-isolation`, in an
   environment that shares this one's torch.
3. An sdist builds and holds the native sources.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from release.environments import ROOT, fresh, run, smoke


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
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = (sys.executable, "-m", "pip")
        run(
            *pip,
            "wheel",
            ".",
            "--no-build-isolation",
            "--no-deps",
            "--quiet",
            "-w",
            folder / "wheels",
            cwd=ROOT,
        )
        (wheel,) = (folder / "wheels").glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        for part in (
            "jepa_kernels/_native.so",
            "jepa_kernels/py.typed",
            "jepa_kernels/_host",
            "jepa/",
        ):
            assert any(n.startswith(part) for n in names), f"the wheel lacks {part}"
        assert not any(n.startswith(("tests", "benchmarks", "csrc")) for n in names), (
            "the wheel holds development files"
        )
        run(*pip, "--version")
        run(
            sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder / "sdist", cwd=ROOT
        )
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

        isolated = fresh(folder / "isolated", share_torch=True)
        run(
            isolated,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            ROOT,
            cwd=folder,
            env={**os.environ, "JEPA_KERNELS_CUDA": "0"},
        )
        smoke(isolated, folder, "installed")
        editable = fresh(folder / "editable", share_torch=True)
        run(
            editable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "setuptools>=77",
            "wheel",
            "pybind11",
            "ninja",
        )
        copy = folder / "copy"
        run("git", "clone", "--quiet", ROOT, copy)
        command = (
            editable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-e",
            copy,
        )
        run(*command, cwd=folder, env={**os.environ, "JEPA_KERNELS_CUDA": "0"})
        smoke(editable, folder, "editable")

        if not chosen.skip_other_torch:
            other = fresh(folder / "other", share_torch=False)
            run(other, "-m", "pip", "install", "--quiet", chosen.torch, "numpy")
            run(other, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
            smoke(other, folder, "installed")
    print("every way of installing works")


if __name__ == "__main__":
    main()
