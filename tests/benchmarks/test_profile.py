"""jepa_kernels.profile: every op has a range, totals add up, the trace is a trace, nothing is left
behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import jepa_kernels
from jepa_kernels.backend import OPS
from jepa_kernels.profile import profile


def attention(backend: str | None = None, gradient: bool = True) -> None:
    x = torch.randn(2, 12, 3, 2, 32, requires_grad=gradient)
    out = jepa_kernels.masked_attention(*x.unbind(2), backend=backend)
    if gradient:
        out.sum().backward()


def kernel_backend() -> str:
    if not jepa_kernels.native.available():
        pytest.skip(f"the native library is missing: {jepa_kernels.native.reason()}")
    return "cpu"


def test_forward_and_backward_have_a_range_each() -> None:
    backend = kernel_backend()
    with profile() as session:
        for _ in range(3):
            attention(backend)
    rows = {(row.op, row.pass_name, row.backend): row for row in session.summary()}
    assert {key: row.calls for key, row in rows.items()} == {
        ("masked_attention", "forward", "cpu"): 3,
        ("masked_attention", "backward", "cpu"): 3,
    }
    assert 0 < sum(span.seconds for span in session.spans) < session.wall_s
    assert all(row.slowest_s <= row.seconds for row in rows.values())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_composed_backends_have_a_forward_range(backend: str) -> None:
    with profile() as session:
        attention(backend, gradient=False)
    assert [(span.pass_name, span.backend) for span in session.spans] == [("forward", backend)]


def test_lists_of_tensors_and_shapes() -> None:
    targets = [torch.zeros(5, 7), torch.zeros(3)]
    with profile() as session:
        jepa_kernels.ema_update_(targets, [torch.ones(5, 7), torch.ones(3)], 0.5)
    (row,) = session.summary(by_shape=True)
    assert (
        row.op.startswith("ema_update")
        and row.shape == "5x7"
        and torch.equal(targets[1], torch.full((3,), 0.5))
    )
    assert "5x7" in session.table(by_shape=True) and "5x7" not in session.table()


def test_table_accounts_for_the_whole_context() -> None:
    with profile() as session:
        attention()
        torch.randn(300, 300) @ torch.randn(300, 300)
    lines = session.table().splitlines()
    assert lines[0].split()[:3] == ["op", "pass", "backend"] and lines[-1].startswith(
        "everything else"
    )
    shares = [float(line.split()[-2]) for line in lines[1:]]
    assert round(sum(shares)) == 100


def test_trace_holds_the_ranges(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trace.json"
    with profile(trace=path):
        attention("torch", gradient=False)
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert "jepa_kernels::masked_attention.forward [torch]" in names


def test_nothing_is_left_behind_even_after_an_error() -> None:
    before = {name: dict(op.backends) for name, op in OPS.items()}
    with pytest.raises(RuntimeError, match="inside"), profile():
        attention("torch", gradient=False)
        raise RuntimeError("inside")
    assert {name: dict(op.backends) for name, op in OPS.items()} == before


def test_sessions_nest_and_can_be_reused() -> None:
    outer, inner = profile(), profile()
    with outer:
        attention("torch", gradient=False)
        with inner:
            attention("torch", gradient=False)
    assert (len(outer.spans), len(inner.spans)) == (2, 1)
    with inner:
        attention("torch", gradient=False)
    assert len(inner.spans) == 1


def test_explain_and_refusals_work_inside() -> None:
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    with profile():
        assert "masked_attention" in jepa_kernels.explain("masked_attention", x, x, x)
        with pytest.raises(jepa_kernels.BackendUnsupportedError):
            jepa_kernels.masked_attention(x, x, x, backend="cuda")


def test_results_do_not_change() -> None:
    x = torch.randn(2, 12, 3, 2, 32)
    plain = jepa_kernels.masked_attention(*x.unbind(2))
    with profile():
        ranged = jepa_kernels.masked_attention(*x.unbind(2))
    assert torch.equal(plain, ranged)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="profile: trace must be a path or None, got int"):
        profile(trace=3)
    session = profile()
    with session, pytest.raises(RuntimeError, match="entered once"):
        session.__enter__()
