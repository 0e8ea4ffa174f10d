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
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Run with an empty PATH, from a folder that is not the checkout.
SMOKE = """
import torch
import jepa_kernels
from jepa_kernels import Rope3D, masked_attention, native
print("torch", torch.__version__, "package", jepa_kernels.__version__, "isa", native.isa_name())
assert "site-packages" in jepa_kernels.__file__ or {editable!r} == "editable", jepa_kernels.__file__
assert native.available(), native.reason()
assert native.host_reason() is None, native.host_reason()
q, k, v = (torch.randn(2, 50, 3, 64, requires_grad=True) for _ in range(3))
options = dict(query_ids=torch.arange(50), rope=Rope3D((2, 5, 5)))
results = {{}}
for backend in ("cpu", "reference"):
    out = masked_attention(q, k, v, **options, backend=backend)
    results[backend] = (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))
for a, b in zip(*results.values()):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
torch.library.opcheck(
    torch.ops.jepa_kernels.masked_attention_fwd.default,
    (q.detach().requires_grad_(), k, v, *[None] * 5, [0, 0, 0], 0.125, None, None, 0, "cpu"),
)
print("smoke test passed")
"""


def run(*command: str | Path, **kw) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run([str(c) for c in command], check=True, **kw)


def fresh(folder: Path, share_torch: bool) -> Path:
    """A new environment; with `share_torch` it sees this one's torch through a .pth file, so
    nothing is downloaded."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if share_torch:
        import torch

        site = next((folder / "lib").iterdir()) / "site-packages"
        for name in _closure():
            source = Path(torch.__file__).parents[1] / name
            if source.exists() and not (site / name).exists():
                (site / name).symlink_to(source)
    return python


def _closure() -> list[str]:
    """Top-level folders of torch and what it imports."""
    from importlib import metadata

    names: list[str] = []
    # An environment brings its own setuptools; the metadata of another one beside it would deceive
    # pip.
    queue, seen = ["torch", "numpy"], {"setuptools", "pip", "wheel"}
    while queue:
        package = queue.pop()
        if package in seen:
            continue
        seen.add(package)
        try:
            files = metadata.files(package) or []
            requirements = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            continue
        names += [part for part in {f.parts[0] for f in files} if part not in ("..", "bin")]
        queue += [
            r.split(";")[0].split("[")[0].strip().split(" ")[0].rstrip("<>=!~0123456789.,")
            for r in requirements
            if "extra" not in r
        ]
    return names


def smoke(python: Path, where: Path, kind: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PATH", "PYTHONPATH")}
    run(
        python,
        "-c",
        SMOKE.format(editable=kind),
        cwd=where,
        env={**environment, "PATH": "/nonexistent"},
    )
    run(
        python,
        "-m",
        "jepa_kernels",
        "doctor",
        cwd=where,
        env={**environment, "PATH": "/nonexistent"},
    )


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
