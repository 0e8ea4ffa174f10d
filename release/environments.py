"""Environments of Python to build and try distributions in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Run with an empty PATH, from a folder that is not the checkout.
SMOKE = """
import torch
import jepa_kernels
from jepa_kernels import Rope3D, masked_attention, native
from jepa_kernels.testing import FLOAT32_DEEP
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
    torch.testing.assert_close(a, b, **FLOAT32_DEEP)
torch.library.opcheck(
    torch.ops.jepa_kernels.masked_attention_fwd.default,
    (q.detach().requires_grad_(), k, v, *[None] * 5, [0, 0, 0], 0.125, None, None, 0, "cpu"),
)
print("smoke test passed")
"""


def run(*command: str | Path, **kw) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run([str(c) for c in command], check=True, **kw)


def interpreter(version: str) -> Path | None:
    """A CPython of this version (such as 3.12): on PATH, among pyenv's or uv's, or None."""
    places = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    uv = Path.home() / ".local" / "share" / "uv" / "python"
    places += sorted(pyenv.glob(f"{version}.*/bin/python{version}"))
    places += sorted(uv.glob(f"cpython-{version}*/bin/python{version}"))
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    for place in filter(None, places):
        # A launcher of pyenv is there for versions that are not.
        said = subprocess.run([place, "-c", asked], capture_output=True, text=True, check=False)
        if said.returncode == 0 and said.stdout.strip() == version:
            return Path(place)
    return None


def fresh(folder: Path, share_torch: bool = False, base: str | Path = sys.executable) -> Path:
    """The Python of a new environment of `base`; with `share_torch` it sees this environment's
    torch through links, so nothing is downloaded."""
    run(base, "-m", "venv", folder)
    if share_torch:
        import torch

        site = next((folder / "lib").iterdir()) / "site-packages"
        for name in _closure():
            source = Path(torch.__file__).parents[1] / name
            if source.exists() and not (site / name).exists():
                (site / name).symlink_to(source)
    return folder / "bin" / "python"


def _closure() -> list[str]:
    """Top-level folders of torch and what it imports."""
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
    """The installed package computes, and `doctor` answers, with no compiler and no home."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PATH", "PYTHONPATH")}
    environment |= {"PATH": "/nonexistent", "HOME": "/proc/nobody"}
    run(python, "-c", SMOKE.format(editable=kind), cwd=where, env=environment)
    run(python, "-m", "jepa_kernels", "doctor", cwd=where, env=environment)
