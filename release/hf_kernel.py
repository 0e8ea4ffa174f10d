"""A folder that Hugging Face's `kernels` loads.

    python -m release.hf_kernel

    dist/jepa-kernels/
      build.toml, CARD.md, LICENSE
      torch-ext/jepa_kernels/   the Python package
      build/torch-cuda/         Triton kernels
      build/torch-cpu/          PyTorch operations
      build/torch-stable-abi211-cpu-x86_64-linux/      with the C++ kernels
      build/torch-stable-abi211-cu130-x86_64-linux/    with the CUDA kernels too, where nvcc is

Each variant is the package under an id of its own, under which it also registers its ops: several
of them, and an installed jepa_kernels, can be in one process. The id names the sources by their
digest. Layout and metadata follow the "kernel requirements" of the `kernels` documentation.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from .environments import ROOT, run

TEMPLATE = Path(__file__).parent / "hf"
STABLE_ABI = "torch-stable-abi211"  # TORCH_TARGET of setup.py
# The release that the folder was tried with.
KERNELS_MINIMUM = "0.17.0"
ARCHS = ["8.0", "9.0a", "10.0a", "12.0"]  # CUDA_ARCHS of setup.py
PACKAGE = ("*.py", "preferences.json", "py.typed")


def package_files() -> list[Path]:
    """The Python package without what was compiled in place, relative to its folder."""
    package = ROOT / "jepa_kernels"
    found = {path for pattern in PACKAGE for path in package.rglob(pattern)}
    return sorted(path.relative_to(package) for path in found)


def source_digest() -> str:
    """Seven digits that change with any source."""
    digest = hashlib.sha256()
    csrc = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    for path in [*(ROOT / "jepa_kernels" / name for name in package_files()), *csrc]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:7]


def copy_package(folder: Path) -> None:
    for name in package_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "jepa_kernels" / name, folder / name)


def identifier(variant: str) -> str:
    """The variant's name as a module of Python and a namespace of torch.ops."""
    return f"_jepa_kernels_{variant.removeprefix('torch-').replace('-', '_')}_{source_digest()}"


def write_metadata(folder: Path, backend: str, archs: list[str] | None = None) -> None:
    general = tomllib.loads((TEMPLATE / "build.toml").read_text())["general"]
    files = {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "name": general["name"],
        "id": identifier(folder.name),
        "version": general["version"],
        "license": general["license"],
        "kernels-minver": KERNELS_MINIMUM,
        "python-depends": [],
        "backend": {"type": backend} | ({"archs": archs} if archs else {}),
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def native_libraries(namespace: str, folder: Path, cuda: bool) -> list[Path]:
    """The libraries that setup.py builds, with their ops under `namespace`. Objects lie where
    every build has them, so that only the files that register ops are compiled again."""
    run(
        *(sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", folder),
        cwd=ROOT,
        env={
            **os.environ,
            "JEPA_KERNELS_NATIVE": "1",
            "JEPA_KERNELS_CUDA": "1" if cuda else "0",
            "JEPA_KERNELS_NAMESPACE": namespace,
        },
    )
    return [folder / "jepa_kernels" / name for name in ("_native.so", "_cuda.so")[: 1 + cuda]]


def cuda_version() -> str | None:
    """The release of the CUDA compiler on PATH as variants spell it, such as cu130; or None."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("JEPA_KERNELS_CUDA") == "0":
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return None if found is None else f"cu{found[1]}{found[2]}"


def oldest_glibc(library: Path) -> str:
    """The version of glibc that a library asks for."""
    versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())
    return "{}.{}".format(*max((int(major), int(minor)) for major, minor in versions))


def write(out: Path, *, native: bool, cuda: str | None) -> list[Path]:
    """Writes the folder anew; returns its variants."""
    shutil.rmtree(out, ignore_errors=True)
    copy_package(out / "torch-ext" / "jepa_kernels")
    for path in (TEMPLATE / "build.toml", TEMPLATE / "CARD.md", ROOT / "LICENSE"):
        shutil.copyfile(path, out / path.name)
    variants = []
    for backend in tomllib.loads((out / "build.toml").read_text())["general"]["backends"]:
        folder = out / "build" / f"torch-{backend}"
        copy_package(folder)
        write_metadata(folder, backend)
        variants.append(folder)
    system = f"{platform.machine()}-{platform.system().lower()}"
    for backend in filter(None, ("cpu", cuda)) if native else ():
        folder = out / "build" / f"{STABLE_ABI}-{backend}-{system}"
        copy_package(folder)
        namespace = f"{identifier(folder.name)}_native"
        with tempfile.TemporaryDirectory() as built:
            for library in native_libraries(namespace, Path(built), backend != "cpu"):
                shutil.copyfile(library, folder / library.name)
                print(f"{folder.name}/{library.name}: glibc {oldest_glibc(library)} or later")
        write_metadata(folder, *(("cpu",) if backend == "cpu" else ("cuda", ARCHS)))
        variants.append(folder)
    return variants


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m release.hf_kernel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "jepa-kernels")
    parser.add_argument("--no-native", action="store_true", help="only the variants of Python")
    chosen = parser.parse_args()
    for folder in write(chosen.out, native=not chosen.no_native, cuda=cuda_version()):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
