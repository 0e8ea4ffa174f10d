"""Choosing, forcing and refusing backends; compiled graphs under each selection."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import jepa_kernels
from jepa_kernels import (
    BackendUnsupportedError,
    Rope3D,
    backend,
    explain,
    masked_attention,
    native,
    preferences,
    use_backend,
)
from jepa_kernels.ops.masked_attention.contract import OP
from jepa_kernels.testing import FLOAT32, attention_case, patched_backend
from tests.conftest import missing

CPU_BACKENDS = ["torch", "cpu"]


def _need(name: str) -> None:
    if name == "cpu" and not native.available():
        missing(str(native.reason()))


def _arguments(**kw):
    case = attention_case(**kw)
    return tuple(t.float() for t in (case.query, case.key, case.value)), case.options(), case


def test_precedence(monkeypatch):
    _need("cpu")
    monkeypatch.setattr(backend, "_environment", "reference")
    assert backend.requested(None) == ("reference", "forced by JEPA_KERNELS_BACKEND")
    with use_backend("torch"):
        assert backend.requested(None)[0] == "torch"
        with use_backend("cpu"):
            assert backend.requested(None)[0] == "cpu"
        assert backend.requested(None)[0] == "torch"
        assert backend.requested("cpu") == ("cpu", "forced by the backend argument")
    assert backend.requested(None)[0] == "reference"
    with pytest.raises(RuntimeError, match="inside"), use_backend("torch"):
        raise RuntimeError("inside")
    assert backend.requested(None)[0] == "reference"


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError,
        match="use_backend name must be one of auto, reference, torch, cpu, triton, cuda, flash, "
        "got 'gpu'",
    ):
        use_backend("gpu")
    child = subprocess.run(
        [sys.executable, "-c", "import jepa_kernels"],
        env={**os.environ, "JEPA_KERNELS_BACKEND": "fast"},
        capture_output=True,
        text=True,
    )
    assert child.returncode != 0
    assert "JEPA_KERNELS_BACKEND must be one of" in child.stderr


def test_a_forced_backend_never_falls_back_and_lists_every_reason():
    x = torch.randn(1, 4, 2, 12, dtype=torch.float64)
    with pytest.raises(BackendUnsupportedError) as caught:
        masked_attention(x, x, x, backend="cuda")
    text = str(caught.value)
    for part in (
        "backend 'cuda' (forced by the backend argument)",
        "head_dim must be",
        "dtype must be",
        "must be on a CUDA",
        "float64 cpu",
    ):
        assert part in text
    assert 'backend="torch"' in text
    assert isinstance(caught.value, NotImplementedError)
    assert masked_attention(x, x, x).shape == x.shape  # auto finds torch


def test_explain_tells_without_running():
    (q, k, v), options, _ = _arguments(lengths=(6,))

    def ran(*given):
        pytest.fail("explain ran the op")

    with (
        patched_backend("masked_attention", "torch", compose=ran),
        patched_backend("masked_attention", "cpu", forward=ran),
    ):
        text = explain("masked_attention", q, k, v, **options)
    for name in OP.priority:
        assert f"  {name}" in text
    assert "runs on" in text
    assert "cuda:0" not in text
    with pytest.raises(ValueError, match="op must be one of"):
        explain("attention", q, k, v)


def test_auto_follows_committed_preferences(monkeypatch):
    _need("cpu")
    (q, k, v), options, _ = _arguments(lengths=(6,))
    kind = preferences.device_kind("cpu")
    loss = backend.Preference(
        "masked_attention", kind, "float32", "tiny", "cpu", "torch", "0.31x in a record"
    )
    monkeypatch.setattr(preferences, "_table", preferences.indexed([loss]))
    text = explain("masked_attention", q, k, v, **options)
    assert "runs on    torch" in text
    assert "slower than torch here: 0.31x in a record" in text
    with use_backend("cpu"):  # a forced backend runs all the same
        assert "runs on    cpu" in explain("masked_attention", q, k, v, **options)
    # Where the faster one cannot run, the slower one does.
    gone = backend.Reason("is not here", "machine")
    with patched_backend("masked_attention", "torch", unsupported=lambda inputs: [gone]):
        assert "runs on    cpu" in explain("masked_attention", q, k, v, **options)


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compiled_equals_eager(name, packed):
    """fullgraph, forward and gradients, under use_backend; the eager and the compiled result are
    the same bits for a kernel."""
    _need(name)
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    tensors, options, _ = _arguments(
        lengths=(5, 9) if packed else (7, 7), packed=packed, head_dim=16
    )
    leaves = [t.requires_grad_() for t in tensors]

    def step(q, k, v):
        return masked_attention(q * 1.5, k, v, **options).tanh()

    with use_backend(name):
        compiled = torch.compile(step, fullgraph=True)
        results = [
            (f(*leaves), torch.autograd.grad(f(*leaves).sum(), leaves)) for f in (step, compiled)
        ]
    for a, b in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)


def test_a_change_of_backend_recompiles():
    _need("cpu")
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    (q, k, v), options, _ = _arguments(lengths=(7,), head_dim=16)
    seen = []

    def spy(graph, inputs):
        seen.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    compiled = torch.compile(
        lambda: masked_attention(q, k, v, **options), fullgraph=True, backend=spy
    )
    for name in ("cpu", "torch", "cpu"):
        with use_backend(name):
            compiled()
    assert len(seen) == 2
    assert any("masked_attention_fwd" in target for target in seen[0])
    assert not any("masked_attention_fwd" in target for target in seen[1])


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_a_thousand_length_lists_make_at_most_two_graphs(name, dynamic):
    """Lengths are data. By default with a fixed number of sequences, as a training batch has; under
    dynamic=True that number varies too.

    Sequences of 0 tokens are in; totals of 0 and 1 are not, because Dynamo makes a graph of its own
    for sizes 0 and 1.
    """
    _need(name)
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    rope = Rope3D((4, 4, 4))
    compiled = torch.compile(
        lambda q, ids, cu: masked_attention(
            q, q, q, query_ids=ids, rope=rope, cu_seqlens_q=cu, backend=name
        ),
        fullgraph=True,
        backend=count,
        dynamic=dynamic,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        sequences = 4 if dynamic is None else int(torch.randint(1, 6, (), generator=generator))
        lengths = torch.randint(0, 6, (sequences,), generator=generator)
        lengths[0] += 2
        cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(torch.int32)
        total = int(lengths.sum())
        compiled(torch.randn(total, 1, 8), torch.randint(0, 64, (total,), generator=generator), cu)
    assert graphs <= 2


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_autocast_checkpoint_and_export(name):
    _need(name)
    (q, k, v), options, case = _arguments(lengths=(9, 9), head_dim=16)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_attention(*leaves, **options, backend=name)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in grads)

    def run(q, k, v):
        return masked_attention(q, k, v, **options, backend=name)

    plain = torch.autograd.grad(run(*leaves).sum(), leaves)
    checkpointed = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False)
    for a, b in zip(plain, torch.autograd.grad(checkpointed.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)

    class Module(torch.nn.Module):
        def forward(self, q, k, v, ids):
            return masked_attention(q, k, v, query_ids=ids, rope=case.rope, backend=name)

    arguments = (*(t.detach() for t in leaves), case.query_ids)
    program = torch.export.export(Module(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Module()(*arguments))


def test_inference_mode_tables_do_not_poison_training():
    rope = Rope3D((3, 5, 7))
    x = torch.randn(1, 4, 2, 16)
    ids = torch.arange(4)
    with torch.inference_mode():
        masked_attention(x, x, x, query_ids=ids, rope=rope)
    x.requires_grad_()
    masked_attention(x, x, x, query_ids=ids, rope=rope).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_the_public_names_exist():
    for name in jepa_kernels.__all__:
        assert getattr(jepa_kernels, name) is not None
