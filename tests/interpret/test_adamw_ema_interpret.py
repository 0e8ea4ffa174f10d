"""The Triton kernel of adamw_ema under the interpreter: AdamW within its budget, the teacher bit
for bit."""

from __future__ import annotations

import pytest
import torch

from jepa_kernels import TeacherLists, adamw_ema_, ema_update_
from jepa_kernels.ops.adamw_ema import triton as backend
from jepa_kernels.testing import FLOAT32_SHORT, assert_within_budget
from tests.ops.test_adamw_ema import HYPER, LISTS, case, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1024  # of the kernel, which cannot be imported before the interpreter is chosen


@pytest.mark.parametrize("param", DTYPES)
def test_adamw_matches_the_float64_reference(param):
    for state, target, followed in ((param, torch.float32, 2), (torch.float32, param, 1)):
        values = case(
            param, param, state, target, sizes=((3,), (0, 2), (BLOCK + 5,), ()), followed=followed
        )
        expected = run("reference", {name: [t.double() for t in v] for name, v in values.items()})
        peers, actual = run("reference", values), run("triton", values)
        dtype = max((param, target), key=lambda d: torch.finfo(d).eps)
        for name in LISTS:
            for i, (a, e, p) in enumerate(
                zip(actual[name], expected[name], peers[name], strict=True)
            ):
                assert_within_budget(
                    f"{name}[{i}]", a, e, p, dtype=dtype if name == "targets" else None
                )


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_adamw_moves_its_teacher_as_ema_update_does(rounding):
    values = case(target=torch.bfloat16, sizes=((7,), (30,)), followed=2)
    options = {"rounding": rounding, "seed": 5 if rounding == "stochastic" else None}
    options["compensations"] = (
        [torch.zeros_like(t) for t in values["targets"]] if rounding == "kahan" else None
    )
    options["copies"] = [torch.empty_like(t, dtype=torch.float16) for t in values["targets"]]
    actual = run("triton", values, momentum=0.99, **options)
    targets = [t.clone() for t in values["targets"]]
    ema_update_(targets, actual["params"], 0.99, backend="reference", **options)
    assert all(torch.equal(a, e) for a, e in zip(actual["targets"], targets, strict=True))
    assert all(torch.equal(a, e) for a, e in zip(actual["copies"], options["copies"], strict=True))


def test_adamw_honours_scale_and_skips():
    values = case(sizes=((7,), (30,)), followed=1)
    skipped = run("triton", values, found_inf=torch.ones(()), steps=0.0)
    assert all(
        torch.equal(a, b)
        for name in LISTS
        for a, b in zip(skipped[name], values[name], strict=True)
    )
    scaled = run(
        "triton",
        {**values, "grads": [8 * g for g in values["grads"]]},
        grad_scale=torch.tensor(8.0),
        found_inf=torch.zeros(()),
    )
    plain = run("reference", values)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "targets"):
        assert all(
            torch.allclose(a, b, **FLOAT32_SHORT)
            for a, b in zip(scaled[name], plain[name], strict=True)
        ), name


def test_a_direct_call_with_one_group():
    p, g, m, v = ([torch.full((3,), x)] for x in (1.0, 2.0, 0.0, 0.0))
    target = [torch.ones(3)]
    hyper = torch.tensor(HYPER[:1], dtype=torch.float64)
    adamw_ema_(
        p,
        g,
        m,
        v,
        [torch.ones(())],
        hyper=hyper,
        teacher=TeacherLists(target, 0.5),
        backend="triton",
    )
    # The first AdamW step moves by lr against the sign of the gradient, after decay.
    torch.testing.assert_close(p[0], torch.full((3,), 1.0 - 1e-2 * 0.05 - 1e-2))
    torch.testing.assert_close(target[0], (1.0 + p[0]) / 2)


@pytest.mark.parametrize("column", [0, 2, 5, 6])
def test_a_planted_fault_is_noticed(column, monkeypatch):
    """The comparison of this file fails when one scalar of the step is wrong by a percent."""
    sound = backend.step_scalars

    def faulty(*arguments):
        scalars = sound(*arguments)
        scalars[:, column] *= 1.01
        return scalars

    monkeypatch.setattr(backend, "step_scalars", faulty)
    values = case(sizes=((7,), (30,)), followed=2)
    expected, actual = (
        run("reference", {name: [t.double() for t in v] for name, v in values.items()}),
        run("triton", values),
    )
    with pytest.raises(AssertionError):
        for name in LISTS:
            for a, e in zip(actual[name], expected[name], strict=True):
                assert_within_budget(name, a, e)
