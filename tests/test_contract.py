"""Every op is complete and follows the contract; a new backend is one file and one word."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import jepa_kernels
from jepa_kernels.backend import OPS
from jepa_kernels.contract import Function, InPlace, Signature, differentiable, written

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(
    p.name for p in (ROOT / "jepa_kernels" / "ops").iterdir() if (p / "api.py").exists()
)
each_op = pytest.mark.parametrize("op", FOLDERS)


def public(op: str):
    for name in (op, f"{op}_"):
        if hasattr(jepa_kernels, name):
            return getattr(jepa_kernels, name)
    pytest.fail(f"jepa_kernels exports neither {op} nor {op}_")


def test_every_contract_is_registered():
    files = (ROOT / "jepa_kernels" / "ops").glob("**/contract.py")
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files}
    assert sorted(id(importlib.import_module(m).OP) for m in modules) == sorted(
        id(op) for op in OPS.values()
    )


@each_op
def test_an_op_has_its_files(op):
    wanted = [
        *(f"csrc/{op}/{name}" for name in ("params.h", "binding.cpp", "cpu", "cuda")),
        f"tests/ops/test_{op}.py",
        f"tests/ops/fuzz_{op}.py",
        f"tests/golden/{op}.json",
        f"benchmarks/bench_{op}.py",
        f"tests/simt/test_{op}*.py",
        f"tests/interpret/test_{op}*.py",
    ]
    assert not [path for path in wanted if not list(ROOT.glob(path))]


@each_op
def test_the_public_docstring_keeps_its_sections(op):
    text = inspect.getdoc(public(op)) or ""
    for section in ("Args:", "Returns:", "Raises:", "Notes:", "Example:"):
        assert section in text, f"{op}: the docstring lacks {section}"
    assert "arXiv" in text or "paper" in text.lower(), f"{op}: the docstring names no source"
    # What queries and keys each have one of counts once.
    names = inspect.signature(public(op)).parameters
    pairs = [n for n in names if n.startswith("key_") and n.replace("key_", "query_") in names]
    pairs += [n for n in names if n.endswith("_k") and n.removesuffix("k") + "q" in names]
    assert len(names) - len(pairs) <= 12


@pytest.mark.parametrize(
    "name", [n for n in jepa_kernels.__all__ if callable(getattr(jepa_kernels, n))]
)
def test_public_names_are_documented_and_their_examples_run(name):
    import doctest

    value = getattr(jepa_kernels, name)
    assert inspect.getdoc(value), name
    module = importlib.import_module(value.__module__)
    results = [
        doctest.DocTestRunner(verbose=False).run(t)
        for t in doctest.DocTestFinder().find(value, name, module=module)
    ]
    assert not sum(r.failed for r in results), f"the example of {name} fails"


@pytest.mark.parametrize("op", list(OPS))
def test_backends_and_examples_fit_the_contract(op):
    record = OPS[op]
    assert record.priority == tuple(record.backends)
    assert record.backends["reference"].unsupported(None) == []
    for backend in record.backends.values():
        runs = backend.compose is not None or backend.forward is not None
        assert runs, f"{backend.name} runs nothing"
        if isinstance(record, Function) and backend.forward is not None:
            assert backend.backward is not None
    for size_class, build in record.examples.items():
        inputs = build("cpu", torch.float32)
        assert inputs.size_class() == size_class
        record.check(inputs)
        assert inputs.device_type == "cpu"
        assert inputs.dtype == torch.float32
        values = record.signature.values(inputs)
        assert record.signature.values(record.signature.inputs(*values)) == values


@dataclass
class _Example:
    first: torch.Tensor = differentiable()
    several: list[torch.Tensor] = differentiable()
    place: torch.Tensor | None
    sizes: list[int]
    factor: float


@dataclass
class _List:
    targets: list[torch.Tensor] = written()
    sources: list[torch.Tensor]
    mode: str


def test_a_signature_reads_the_fields_of_the_inputs():
    signature = Signature(_Example)
    assert signature.schema() == (
        "Tensor first, Tensor[] several, Tensor? place, SymInt[] sizes, float factor"
    )
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    values = signature.values(_Example(a, [b, c], None, [1, 2], 0.5))
    assert [t.numel() for t in signature.given(values)] == [1, 2, 3]
    assert [t.numel() for t in signature.leaves(values)] == [1, 2, 3]
    assert signature.grouped(values, "xyz") == ["x", ["y", "z"], None, None, None]
    assert Signature(_List).schema() == "Tensor(a!)[] targets, Tensor[] sources, str mode"

    @dataclass
    class Wrong:
        table: dict

    Wrong.__annotations__["table"] = dict
    with pytest.raises(TypeError, match="table must have a type of a schema"):
        Signature(Wrong)


def test_support_and_explain_know_reasons_of_the_machine_from_those_of_the_call():
    from jepa_kernels.support import gap

    assert [r.kind for r in gap(OPS["masked_attention"], "cuda", torch.float64)] == ["call"]
    assert gap(OPS["masked_attention"], "cuda", torch.bfloat16) == []
    for op in OPS.values():
        assert isinstance(op, (Function, InPlace))


TOY_FUNCTION = '''
"""A backend that somebody writes: eager PyTorch below a toy's name."""

from dataclasses import replace

import torch

from ...backend import Backend, Reason
from .torch import backward, compose


def unsupported(inputs):
    if inputs.dtype == torch.float16:
        return [Reason("dtype must not be a toy's enemy, got float16")]
    return []


def forward(inputs):
    return tuple(t.contiguous() for t in compose(replace(inputs, return_lse=True)))


BACKEND = Backend("toy", ("cpu",), unsupported, forward, backward)
'''
TOY_IN_PLACE = '''
"""A backend that another package's author writes."""

from ...backend import Backend, Reason
from ..ema.average import update_lists


def unsupported(inputs):
    if any(dtype.itemsize == 8 for dtype in inputs.dtypes):
        return [Reason("dtype must not be a toy's enemy, got 64 bits")]
    return []


def forward(inputs):
    update_lists(
        inputs.targets, inputs.sources, inputs.momentum, inputs.copies, inputs.compensations,
        inputs.streams, inputs.rounding, inputs.seed,
    )


BACKEND = Backend("toy", ("cpu",), unsupported, forward)
'''
TOYS = {"masked_attention": TOY_FUNCTION, "ema_update": TOY_IN_PLACE}


@pytest.fixture(scope="module")
def with_toys(tmp_path_factory):
    """A copy of the packages and tests in which two ops have one backend more."""
    folder = tmp_path_factory.mktemp("toys")
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.npz")
    for name in ("jepa_kernels", "jepa", "benchmarks", "tests", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for op, text in TOYS.items():
        (folder / "jepa_kernels/ops" / op / "toy.py").write_text(text)  # one file
        contract = folder / "jepa_kernels/ops" / op / "contract.py"
        source = contract.read_text()
        changed = source.replace('PRIORITY = ("cuda"', 'PRIORITY = ("toy", "cuda"')  # one word
        assert changed != source
        contract.write_text(changed)
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_new_backend_is_listed_explained_refused_and_compared(with_toys):
    script = """
import json, torch, jepa_kernels
from jepa_kernels import BackendUnsupportedError, explain, masked_attention, support
from benchmarks import bench_ema_update, bench_masked_attention, harness
out = {"file": jepa_kernels.__file__, "names": jepa_kernels.BACKENDS, "table": support.table()}
x = torch.randn(1, 4, 2, 8)
out["explained"] = explain("masked_attention", x, x, x)
out["auto"] = torch.equal(masked_attention(x, x, x), masked_attention(x, x, x, backend="toy"))
try:
    masked_attention(x.half(), x.half(), x.half(), backend="toy")
except BackendUnsupportedError as error:
    out["refused"] = str(error)
quick = harness.Options(quick=True)
for name, module in (("ema", bench_ema_update), ("attention", bench_masked_attention)):
    out[name] = sorted({item.backend for item in module.comparisons(quick)})
print(json.dumps(out))
"""
    out = json.loads(run(with_toys, "-c", script).splitlines()[-1])
    assert out["file"].startswith(str(with_toys))
    assert "toy" in out["names"]
    for op in TOYS:
        assert re.search(rf"\| {op} \| toy \| yes \|", out["table"])
    assert "| adamw_ema | toy" not in out["table"]
    assert "toy        yes" in out["explained"]
    assert "runs on    toy" in out["explained"]
    assert out["auto"]
    assert "must not be a toy's enemy" in out["refused"]
    assert "toy" in out["ema"]
    assert "toy" in out["attention"]


def test_a_new_backend_is_collected_by_its_own_op_and_turns_no_other_red(with_toys):
    files = [f"tests/ops/test_{op}.py" for op in (*TOYS, "adamw_ema")]
    listed = run(with_toys, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *files)
    found = {op: listed.count("toy") for op in TOYS}
    assert all(re.search(rf"test_{op}\.py::\S+\[\S*toy", listed) for op in TOYS), found
    assert not re.search(r"test_adamw_ema\.py::\S+\[\S*toy", listed)
    choice = "opcheck or a_planted_fault_is_noticed or every_width or exact"
    run(with_toys, "-m", "pytest", "-q", "-x", *files[:2], "-k", f"toy and ({choice})")
    others = ["tests/ops/test_adamw_ema.py", "tests/test_contract.py"]
    run(with_toys, "-m", "pytest", "-q", "-x", *others, "-k", "opcheck or fit_the_contract")
