"""Builds the native libraries for the GPU of this machine only: a wheel builds the others too."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from benchmarks.machine import REPOSITORY


def architecture(major: int, minor: int) -> str:
    """nvcc's name of a compute capability; the data-centre ones with their own instructions."""
    return f"{major}{minor}" + ("a" if (major, minor) in ((9, 0), (10, 0)) else "")


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_build: needs a CUDA device, and torch finds none.", file=sys.stderr)
        return 2
    name = architecture(*torch.cuda.get_device_capability())
    environment = {**os.environ, "JEPA_KERNELS_CUDA": "1", "JEPA_KERNELS_CUDA_ARCHS": name}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
