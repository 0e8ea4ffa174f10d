"""The Triton kernels of ema_update and adamw_ema under the interpreter: bit for bit the reference, and AdamW within its budget."""

from __future__ import annotations

import itertools

import pytest
import torch

from jepa_kernels import TeacherLists, adamw_ema_, ema_update_
from jepa_kernels.ops.adamw_ema.op import ROOM as ADAMW_ROOM
from jepa_kernels.ops.ema_update import triton_table
from jepa_kernels.ops.ema_update.op import ROOM as EMA_ROOM
from jepa_kernels.testing import assert_within_budget
from tests.ops.test_adamw_ema import HYPER, LISTS, case, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((3,), (0, 2), (triton_table.BLOCK + 5,), ())


def _lists(target, source, rounding):
    generator = torch.Generator().manual_seed(3)
    targets = [torch.randn(size, generator=generator).to(target) for size in SIZES]
    options = {"rounding": rounding}
    if rounding == "kahan":
        options["compensations"] = [(1e-3 * torch.randn(size, generator=generator)).to(target) for size in SIZES]
    if rounding == "stochastic":
        options["seed"] = 2**40 + 17
    return targets, [(t.float() * 1.05).to(source) for t in targets], options


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
@pytest.mark.parametrize("momentum", [0.2, 0.999, 1.0])
def test_ema_equals_the_reference_bit_for_bit(rounding, momentum):
    for (target, source), copy in zip(itertools.product(DTYPES, DTYPES), itertools.cycle((None, *DTYPES)), strict=False):
        if rounding == "stochastic" and target == torch.float16:
            continue
        results = []
        for backend in ("reference", "triton"):
            targets, sources, options = _lists(target, source, rounding)
            if copy is not None:
                options["copies"] = [torch.full_like(t, torch.nan, dtype=copy) for t in targets]
            ema_update_(targets, sources, momentum, backend=backend, **options)
            results.append([*targets, *options.get("compensations", []), *options.get("copies", [])])
        for i, (expected, actual) in enumerate(zip(*results, strict=True)):
            assert torch.equal(actual, expected), f"tensor {i} of {target} from {source}, copy {copy}"


def test_ema_of_mixed_dtypes_strides_and_ties():
    """One launch for each combination of dtypes; addresses off 16 bytes; a tied target moves once."""
    base = torch.randn(9, 8)
    targets = [base[0].clone(), base.flatten()[1:6].clone().bfloat16(), base.clone().t(), base.flatten()[3:8].clone()]
    sources = [torch.ones(8), torch.ones(5, dtype=torch.float16), torch.ones(8, 9), torch.ones(5)]
    wanted = [0.75 * t.double() + 0.25 for t in targets]
    ema_update_([*targets, targets[0]], [*sources, sources[0]], 0.75, backend="triton")
    for target, expected in zip(targets, wanted, strict=True):
        torch.testing.assert_close(target.double(), expected, rtol=4e-3 if target.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("param", DTYPES)
def test_adamw_matches_the_float64_reference(param):
    for state, target, followed in ((param, torch.float32, 2), (torch.float32, param, 1)):
        values = case(param, param, state, target, sizes=((3,), (0, 2), (triton_table.BLOCK + 5,), ()), followed=followed)
        expected = run("reference", {name: [t.double() for t in v] for name, v in values.items()})
        peers, actual = run("reference", values), run("triton", values)
        dtype = max((param, target), key=lambda d: torch.finfo(d).eps)
        for name in LISTS:
            for i, (a, e, p) in enumerate(zip(actual[name], expected[name], peers[name], strict=True)):
                assert_within_budget(f"{name}[{i}]", a, e, p, dtype=dtype if name == "targets" else None)


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_adamw_moves_its_teacher_as_ema_update_does(rounding):
    values = case(target=torch.bfloat16, sizes=((7,), (30,)), followed=2)
    options = {"rounding": rounding, "seed": 5 if rounding == "stochastic" else None}
    options["compensations"] = [torch.zeros_like(t) for t in values["targets"]] if rounding == "kahan" else None
    options["copies"] = [torch.empty_like(t, dtype=torch.float16) for t in values["targets"]]
    actual = run("triton", values, momentum=0.99, **options)
    targets = [t.clone() for t in values["targets"]]
    ema_update_(targets, actual["params"], 0.99, backend="reference", **options)
    assert all(torch.equal(a, e) for a, e in zip(actual["targets"], targets, strict=True))
    assert all(torch.equal(a, e) for a, e in zip(actual["copies"], options["copies"], strict=True))


def test_adamw_honours_scale_and_skips():
    values = case(sizes=((7,), (30,)), followed=1)
    skipped = run("triton", values, found_inf=torch.ones(()), steps=0.0)
    assert all(torch.equal(a, b) for name in LISTS for a, b in zip(skipped[name], values[name], strict=True))
    scaled = run("triton", {**values, "grads": [8 * g for g in values["grads"]]}, grad_scale=torch.tensor(8.0), found_inf=torch.zeros(()))
    plain = run("reference", values)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "targets"):
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(scaled[name], plain[name], strict=True)), name


def test_tables_are_kept_between_steps():
    targets, sources = [torch.zeros(5), torch.zeros(3)], [torch.ones(5), torch.ones(3)]
    triton_table._tables.clear()
    for _ in range(3):
        ema_update_(targets, sources, 0.5, backend="triton")
    assert len(triton_table._tables) == 1
    assert targets[0].tolist() == [0.875] * 5


@pytest.mark.parametrize("room", [EMA_ROOM, ADAMW_ROOM])
def test_a_planted_fault_is_noticed(room, monkeypatch):
    """The comparison of this file fails when the kernel's launch loses its last tensor."""
    sound = triton_table.table
    values = case(sizes=((7,), (30,)), followed=2)

    def shorter(arrays, streams):
        return sound([column[:-1] for column in arrays], streams[:-1])

    monkeypatch.setattr(room.modules["triton"], "table", shorter)
    expected = run("reference", values)
    if room is ADAMW_ROOM:
        moved = run("triton", values)["params"]
        wanted = expected["params"]
    else:
        moved, wanted = [t.clone() for t in values["targets"]], [t.clone() for t in values["targets"]]
        ema_update_(moved, values["params"], 0.5, backend="triton")
        ema_update_(wanted, values["params"], 0.5, backend="reference")
    assert torch.equal(moved[0], wanted[0]) or torch.allclose(moved[0], wanted[0])
    assert not torch.allclose(moved[1], wanted[1])


def test_a_direct_call_with_one_group():
    p, g, m, v = ([torch.full((3,), x)] for x in (1.0, 2.0, 0.0, 0.0))
    target = [torch.ones(3)]
    hyper = torch.tensor(HYPER[:1], dtype=torch.float64)
    adamw_ema_(p, g, m, v, [torch.ones(())], hyper=hyper, teacher=TeacherLists(target, 0.5), backend="triton")
    # The first AdamW step moves by lr against the sign of the gradient, after decay.
    torch.testing.assert_close(p[0], torch.full((3,), 1.0 - 1e-2 * 0.05 - 1e-2))
    torch.testing.assert_close(target[0], (1.0 + p[0]) / 2)
