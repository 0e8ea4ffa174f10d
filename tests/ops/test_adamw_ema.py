"""adamw_ema_: every backend against the float64 reference and against torch.optim.AdamW followed by
an average."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from jepa_kernels import BackendUnsupportedError, TeacherLists, adamw_ema_, explain, native
from jepa_kernels.ops.adamw_ema.contract import OP
from jepa_kernels.testing import FLOAT32_SHORT, assert_within_budget, patched_backend
from tests.ops.backends import each
from tests.ops.lists import one_thread, run_here, tensors  # noqa: F401

BACKENDS = each("adamw_ema")

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((), (1,), (31, 33), (0, 4), (1025,), (2, 3, 5, 7), (5_001,))
#                 lr    beta1 beta2  eps   decay maximize
HYPER = [[1e-2, 0.9, 0.999, 1e-8, 0.05, 0.0], [3e-3, 0.8, 0.95, 1e-6, 0.0, 1.0]]
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "targets")


def case(
    param=torch.float32, grad=None, state=None, target=torch.float32, sizes=SIZES, followed=None
):
    """Lists of a few steps into a training; the last parameters have no teacher."""
    grad, state = grad or param, state or param
    count = len(sizes) - 2 if followed is None else followed
    values = {
        "params": tensors(sizes, param, 0),
        "grads": tensors(sizes, grad, 1),
        "exp_avgs": [0.1 * t for t in tensors(sizes, state, 2)],
        "exp_avg_sqs": [0.1 * t.abs() + 1e-3 for t in tensors(sizes, state, 3)],
    }
    values["targets"] = [(p.double() + 0.1).to(target) for p in values["params"][:count]]
    return values


def run(
    backend,
    values,
    *,
    steps=3.0,
    momentum=0.9,
    copies=None,
    compensations=None,
    rounding="nearest",
    seed=None,
    device_steps=False,
    **options,
):
    """Copies of every list after one step, by name."""
    local = {name: run_here(backend, values[name]) for name in LISTS}
    extra = {
        name: None if v is None else run_here(backend, v)
        for name, v in (("copies", copies), ("compensations", compensations))
    }
    count = len(local["params"])
    device = local["params"][0].device if device_steps else "cpu"
    step_list = [torch.tensor(float(steps) + i, device=device) for i in range(count)]
    options.setdefault("hyper", torch.tensor(HYPER, dtype=torch.float64))
    options.setdefault("groups", [i % 2 for i in range(count)])
    teacher = TeacherLists(
        local["targets"], momentum, extra["copies"], rounding, extra["compensations"], seed
    )
    adamw_ema_(
        *(local[n] for n in LISTS[:4]), step_list, teacher=teacher, backend=backend, **options
    )
    local |= {name: v for name, v in extra.items() if v is not None}
    return {name: [t.cpu() for t in v] for name, v in local.items()}


def oracle(values, **options):
    return run(
        "reference", {name: [t.double() for t in v] for name, v in values.items()}, **options
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("param", DTYPES)
@pytest.mark.parametrize("mixed", [False, True])
def test_matches_the_float64_reference(backend, param, mixed):
    for target in DTYPES if mixed else (param,):
        values = case(
            param, torch.float32 if mixed else None, torch.float32 if mixed else None, target
        )
        expected, peers, actual = oracle(values), run("reference", values), run(backend, values)
        for name in LISTS:
            # A teacher follows its parameter as stored: it is no more precise than the coarser of
            # the two.
            dtype = (
                max((param, target), key=lambda d: torch.finfo(d).eps)
                if name == "targets"
                else None
            )
            for i, (a, e, p) in enumerate(
                zip(actual[name], expected[name], peers[name], strict=True)
            ):
                assert_within_budget(f"{name}[{i}]", a, e, p, dtype=dtype)
        assert all(
            torch.equal(a, b) for a, b in zip(actual["grads"], values["grads"], strict=True)
        ), "gradients are only read"


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_golden_steps(backend, root):
    for case in json.loads((root / "tests" / "golden" / "adamw_ema.json").read_text())["cases"]:
        param, target = (run_here(backend, [torch.tensor(case[n])])[0] for n in ("param", "target"))
        exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
        hyper = torch.tensor([case["hyper"]], dtype=torch.float64)
        scale = torch.tensor(case["grad_scale"], device=param.device)
        for t, step in enumerate(case["steps"], start=1):
            grad = torch.tensor(step["grad"], device=param.device)
            teacher = TeacherLists([target], case["momentum"])
            adamw_ema_(
                [param],
                [grad],
                [exp_avg],
                [exp_avg_sq],
                [torch.tensor(float(t))],
                hyper=hyper,
                teacher=teacher,
                grad_scale=scale,
                backend=backend,
            )
            for name, actual in (
                ("param", param),
                ("exp_avg", exp_avg),
                ("exp_avg_sq", exp_avg_sq),
                ("target", target),
            ):
                expected = torch.tensor(step[name], dtype=torch.float64)
                torch.testing.assert_close(
                    actual.double().cpu(),
                    expected,
                    **FLOAT32_SHORT,
                    msg=lambda m, n=name, t=t: f"{n}, step {t}: {m}",
                )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_copies_and_rounding_of_the_teacher(backend, rounding):
    """The teacher's side does what ema_update_ does with the updated parameters as sources."""
    from jepa_kernels import ema_update_

    values = case(target=torch.bfloat16)
    options = {"rounding": rounding, "seed": 77 if rounding == "stochastic" else None}
    options["compensations"] = (
        [1e-3 * t for t in tensors(SIZES[:-2], torch.bfloat16, 8)] if rounding == "kahan" else None
    )
    options["copies"] = [
        torch.full_like(t, torch.nan, dtype=torch.float16) for t in values["targets"]
    ]
    actual = run(backend, values, momentum=0.99, **options)
    wanted = {
        name: run_here(backend, v) if isinstance(v, list) else v for name, v in options.items()
    }
    targets, sources = (
        run_here(backend, values["targets"]),
        run_here(backend, actual["params"][: len(SIZES) - 2]),
    )
    ema_update_(targets, sources, 0.99, backend=backend, **wanted)
    for name, expected in (
        ("targets", targets),
        ("copies", wanted["copies"]),
        ("compensations", wanted["compensations"]),
    ):
        if expected is not None:
            assert all(
                torch.equal(a, e.cpu()) for a, e in zip(actual[name], expected, strict=True)
            ), name


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_skipped_step_changes_nothing(backend):
    values = case()
    device = run_here(backend, values["params"])[0].device
    skipped = run(backend, values, found_inf=torch.ones((), device=device), steps=0.0)
    assert all(
        torch.equal(a, b)
        for name in LISTS
        for a, b in zip(skipped[name], values[name], strict=True)
    )
    done, plain = (
        run(backend, values, found_inf=torch.zeros((), device=device)),
        run(backend, values),
    )
    assert all(
        torch.equal(a, b) for name in LISTS for a, b in zip(done[name], plain[name], strict=True)
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_scaled_gradients(backend):
    values = case()
    scale = torch.tensor(64.0, device=run_here(backend, values["params"])[0].device)
    scaled = {**values, "grads": [g * 64.0 for g in values["grads"]]}
    expected, actual = run(backend, values), run(backend, scaled, grad_scale=scale)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "targets"):
        assert all(
            torch.allclose(a, b, **FLOAT32_SHORT)
            for a, b in zip(actual[name], expected[name], strict=True)
        ), name
    assert all(torch.equal(a, b) for a, b in zip(actual["grads"], scaled["grads"], strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_strided_parameters(backend):
    values = case(sizes=((8, 6, 4), (5, 7)), followed=1)
    expected = oracle(values)
    transposed = {
        name: [t.transpose(0, -1).contiguous().transpose(0, -1) for t in v]
        for name, v in values.items()
    }
    uneven = {**transposed, "grads": values["grads"]}
    for layout in (transposed, uneven):
        actual = run(backend, layout)
        for name in LISTS:
            for a, e in zip(actual[name], expected[name], strict=True):
                assert_within_budget(name, a, e)


@pytest.mark.skipif(not native.available(), reason=str(native.reason()))
def test_every_instruction_set_and_thread_count_gives_the_same_bits():
    values = case(
        torch.bfloat16, torch.float32, torch.float32, sizes=((70_003,), (5,), (33_000,)), followed=2
    )
    hyper, momentum = (
        torch.tensor(HYPER, dtype=torch.float64),
        torch.tensor(0.97, dtype=torch.float64),
    )
    results, threads = [], torch.get_num_threads()
    for isa, count in itertools.product(range(native.ISAS.index(native.isa_name()) + 1), (1, 2, 3)):
        lists = {name: [t.clone() for t in v] for name, v in values.items()}
        torch.set_num_threads(count)
        try:
            torch.ops.jepa_kernels_native.adamw_ema_cpu_(
                *(lists[n] for n in LISTS[:4]),
                [torch.tensor(2.0)] * 3,
                hyper,
                [0, 1, 1],
                lists["targets"],
                momentum,
                [],
                [],
                [0, 1],
                0,
                None,
                None,
                None,
                isa,
            )
        finally:
            torch.set_num_threads(threads)
        results.append([t for v in lists.values() for t in v])
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_and_hyperparameters_on_the_device(backend):
    values = case()
    device = run_here(backend, values["params"])[0].device
    expected = run(backend, values)
    for hyper_device in {torch.device("cpu"), device}:
        actual = run(
            backend,
            values,
            device_steps=True,
            hyper=torch.tensor(HYPER, dtype=torch.float64, device=hyper_device),
        )
        for name in LISTS:
            assert all(
                torch.allclose(a, b, **FLOAT32_SHORT)
                for a, b in zip(actual[name], expected[name], strict=True)
            ), name


def _arguments(backend, dtype=torch.float32):
    values = {
        name: run_here(backend, v) for name, v in case(dtype, sizes=((3, 4), (5,), (2,))).items()
    }
    device = values["params"][0].device
    steps = [torch.tensor(2.0) for _ in values["params"]]
    momentum = torch.tensor(0.9, dtype=torch.float64)
    copies = [torch.empty_like(t, dtype=torch.bfloat16) for t in values["targets"]]
    flags = (torch.ones((), device=device), torch.zeros((), device=device))
    hyper = torch.tensor(HYPER, dtype=torch.float64)
    return (
        *(values[n] for n in LISTS[:4]),
        steps,
        hyper,
        [0, 1, 1],
        values["targets"],
        momentum,
        copies,
        [],
        None,
        "nearest",
        *flags,
        backend,
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend):
    # The reference reads the flag and the hyperparameters: it is a specification, not something to
    # trace with data-dependent control.
    torch.library.opcheck(torch.ops.jepa_kernels.adamw_ema_.default, _arguments(backend))


def test_compiles_without_graph_breaks_and_equals_eager():
    hyper = torch.tensor(HYPER, dtype=torch.float64)
    values = case(sizes=((3, 4), (5,), (2,)))
    steps = [torch.tensor(2.0)] * 3

    def update(lists, momentum):
        adamw_ema_(
            *(lists[n] for n in LISTS[:4]),
            steps,
            hyper=hyper,
            groups=[0, 1, 1],
            teacher=TeacherLists(lists["targets"], momentum),
        )

    eager, compiled = ({n: [t.clone() for t in v] for n, v in values.items()} for _ in range(2))
    function = torch.compile(update, fullgraph=True)
    for momentum in (0.9, 0.95):
        update(eager, torch.tensor(momentum))
        function(compiled, torch.tensor(momentum))
    assert all(torch.equal(a, b) for n in LISTS for a, b in zip(eager[n], compiled[n], strict=True))


def _bad(**change):
    """A call of small lists with some arguments changed."""

    def call():
        values = case(sizes=((2,), (3,)), followed=1)
        arguments = {n: values[n] for n in LISTS[:4]} | {"steps": [torch.tensor(1.0)] * 2}
        options = {
            "hyper": torch.tensor(HYPER[:1], dtype=torch.float64),
            "teacher": TeacherLists(values["targets"], 0.9),
        }
        for name, new in change.items():
            place = arguments if name in arguments else options
            place[name] = new(values) if callable(new) else new
        adamw_ema_(**arguments, **options)

    return call


BAD_CALLS = {
    r"grads must have one tensor for each of params \(2\), got 1": _bad(
        grads=lambda v: v["grads"][:1]
    ),
    r"grads\[1\] must have shape \(3,\) like params\[1\], got \(2,\)": _bad(
        grads=lambda v: [v["grads"][0]] * 2
    ),
    r"exp_avgs\[0\] must have dtype .* got int64": _bad(
        exp_avgs=lambda v: [t.long() for t in v["exp_avgs"]]
    ),
    r"exp_avg_sqs\[0\] must have the dtype of exp_avgs\[0\] \(float32\), got bfloat16": _bad(
        exp_avg_sqs=lambda v: [t.bfloat16() for t in v["exp_avg_sqs"]]
    ),
    r"steps\[0\] must be a 0-d float32 or float64 tensor": _bad(
        steps=[torch.ones(1), torch.ones(1)]
    ),
    "steps must have one tensor for each of params": _bad(steps=[]),
    "steps must be at least 1: they count this step, got 0.0": _bad(steps=[torch.tensor(0.0)] * 2),
    r"hyper must be contiguous of shape \[groups, 6\], got \(6,\)": _bad(
        hyper=torch.zeros(6, dtype=torch.float64)
    ),
    "hyper must have dtype float64, got float32": _bad(hyper=torch.zeros(1, 6)),
    "hyper must be a tensor, got list": _bad(hyper=HYPER),
    "groups must be given with 2 rows of hyper, got None": _bad(
        hyper=torch.tensor(HYPER, dtype=torch.float64)
    ),
    r"groups\[1\] must be a row of hyper from 0 to 0, got 1": _bad(groups=[0, 1]),
    "teacher must be a TeacherLists or None, got list": _bad(teacher=[]),
    "targets must have at most one tensor for each of params": _bad(
        teacher=lambda v: TeacherLists([*v["params"], v["params"][0]], 0.5)
    ),
    r"targets\[0\] must have shape \(2,\) like params\[0\]": _bad(
        teacher=lambda v: TeacherLists([torch.ones(3)], 0.5)
    ),
    "momentum must be from 0 to 1, got 2.0": _bad(
        teacher=lambda v: TeacherLists(v["targets"], 2.0)
    ),
    "found_inf must be one number, got shape": _bad(found_inf=torch.zeros(2)),
    "grad_scale must have dtype float32, got float64": _bad(
        grad_scale=torch.ones((), dtype=torch.float64)
    ),
    "params must be distinct tensors, got one of them twice": _bad(
        params=lambda v: [v["params"][1][:2], v["params"][1]]
    ),
    "backend must be one of": _bad(backend="fast"),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD_CALLS[message]()


def test_a_forced_backend_refuses_with_every_reason():
    with pytest.raises(BackendUnsupportedError, match=r"(?s)'triton'.*CUDA device.*try"):
        _bad(backend="triton")()
    values = case(torch.float64)
    call = explain(
        "adamw_ema",
        *(values[n] for n in LISTS[:4]),
        [torch.tensor(1.0)] * len(SIZES),
        hyper=torch.tensor(HYPER[:1], dtype=torch.float64),
    )
    assert "runs on    torch" in call


FAULTS = {
    "gradient sign": lambda a: replace(a, grads=[-g for g in a.grads]),
    "no weight decay": lambda a: replace(
        a, hyper=a.hyper * torch.tensor([1, 1, 1, 1, 0, 1.0], dtype=torch.float64)
    ),
    "step off by one": lambda a: replace(a, steps=[s + 1 for s in a.steps]),
    "groups swapped": lambda a: replace(a, groups=[1 - g for g in a.groups]),
    "momentum swapped": lambda a: replace(a, momentum=1 - a.momentum),
    "teacher forgotten": lambda a: replace(a, momentum=torch.ones_like(a.momentum)),
}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(backend, fault):
    values = case(sizes=((40,), (9, 3), (4,), (5,)))
    expected = oracle(values)
    sound = OP.backends[backend].forward

    def compare():
        actual = run(backend, values)
        for name in LISTS:
            for a, e in zip(actual[name], expected[name], strict=True):
                assert_within_budget(name, a, e)

    compare()
    with (
        patched_backend("adamw_ema", backend, forward=lambda a: sound(FAULTS[fault](a))),
        pytest.raises(AssertionError),
    ):
        compare()
