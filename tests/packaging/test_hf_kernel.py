"""The folder for Hugging Face's `kernels` loads with that package, beside an installed one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from release import hf_kernel
from tests.conftest import missing

# Run where the checkout's package is importable: both copies are then in one process.
SMOKE = """
import sys, torch
from pathlib import Path
import jepa_kernels as installed
from jepa_kernels.testing import EXACT
from kernels import get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

folder, expected = Path(sys.argv[1]), sys.argv[2]
assert Build.open(folder).general.backends
kernel = get_local_kernel(folder)
variant = Path(kernel.__file__).parent
assert variant.name == expected, variant
metadata = Metadata.read_from_file(variant / "metadata.json")
Digest.hash_variant(DigestAlgorithm.SHA256, variant).validate(metadata.digest)
assert kernel.__name__ == metadata.id != installed.__name__
q, k, v = (torch.randn(2, 50, 3, 64, requires_grad=True) for _ in range(3))
results = []
for package in (installed, kernel):
    options = dict(query_ids=torch.arange(50), rope=package.Rope3D((2, 5, 5)))
    out = package.masked_attention(q, k, v, **options, backend=sys.argv[3])
    results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
for a, b in zip(*results):
    torch.testing.assert_close(a, b, **EXACT)
op = getattr(torch.ops, metadata.id).masked_attention_fwd.default
torch.library.opcheck(
    op, (q, k, v, *[None] * 5, [0, 0, 0], 0.125, None, None, 0, sys.argv[3])
)
"""


def load(folder, variant, backend):
    if importlib.util.find_spec("kernels") is None:
        missing("the package kernels is not installed (pip install kernels)")
    done = subprocess.run(
        [sys.executable, "-c", SMOKE, str(folder), variant, backend],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def python_variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "jepa-kernels"
    hf_kernel.write(folder, native=False, cuda=None)
    return folder


def test_the_python_variant_loads_and_agrees(python_variants):
    load(python_variants, "torch-cpu", "torch")


def test_the_layout_is_what_kernels_documents(python_variants):
    assert (python_variants / "CARD.md").is_file()
    assert (python_variants / "torch-ext" / "jepa_kernels" / "__init__.py").is_file()
    ids = set()
    for backend in ("cpu", "cuda"):
        folder = python_variants / "build" / f"torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert metadata["id"].isidentifier()
        assert not list(folder.rglob("*.so"))
        ids.add(metadata["id"])
    assert len(ids) == 2
    assert list((python_variants / "build" / "torch-cuda").rglob("*triton*.py"))


def test_every_import_of_the_package_is_relative(python_variants):
    """Two copies in one process must not reach into each other."""
    for path in (python_variants / "torch-ext").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(("import jepa_kernels", "from jepa_kernels")), path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_stable_abi_variant_loads_and_agrees(tmp_path):
    (variant,) = [
        folder
        for folder in hf_kernel.write(tmp_path / "jepa-kernels", native=True, cuda=None)
        if folder.name.startswith(hf_kernel.STABLE_ABI)
    ]
    load(tmp_path / "jepa-kernels", variant.name, "cpu")


def test_what_setup_py_builds_is_what_the_names_say(root):
    setup = (root / "setup.py").read_text()
    assert "0x020b000000000000ULL" in setup  # torch 2.11
    assert hf_kernel.STABLE_ABI.endswith("211")
    architectures = ";".join(arch.replace(".", "") for arch in hf_kernel.ARCHS)
    assert f'CUDA_ARCHS = "{architectures}"' in setup


def test_the_cuda_variant_is_named_as_kernels_parses_it(tmp_path, monkeypatch):
    """Layout alone: nothing is compiled."""

    def libraries(namespace, folder, cuda):
        assert namespace.endswith("_native") and namespace.isidentifier()
        paths = [folder / name for name in ("_native.so", "_cuda.so")[: 1 + cuda]]
        for path in paths:
            path.write_bytes(b"GLIBC_2.2 GLIBC_2.34")
        return paths

    monkeypatch.setattr(hf_kernel, "native_libraries", libraries)
    made = {path.name: path for path in hf_kernel.write(tmp_path / "x", native=True, cuda="cu130")}
    (cuda,) = [path for name, path in made.items() if "cu130" in name]
    metadata = json.loads((cuda / "metadata.json").read_text())
    assert metadata["backend"] == {"type": "cuda", "archs": ["8.0", "9.0a", "10.0a", "12.0"]}
    assert {"_native.so", "_cuda.so", "__init__.py"} <= metadata["digest"]["files"].keys()
    assert not (made[cuda.name.replace("cu130", "cpu")] / "_cuda.so").exists()
    if importlib.util.find_spec("kernels") is None:
        missing("the package kernels is not installed (pip install kernels)")
    from kernels.variants import parse_variant

    assert [parse_variant(name).variant_str for name in made] == list(made)
