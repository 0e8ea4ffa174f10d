"""ema_update_: every backend against the float64 reference, the published numbers, and the
properties of a moving average."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_kernels import BACKENDS as BACKEND_NAMES
from jepa_kernels import BackendUnsupportedError, ema_update_, explain, native, use_backend
from jepa_kernels.ops.ema import stochastic
from jepa_kernels.ops.ema_update.contract import OP, update_plain
from jepa_kernels.testing import (
    FLOAT32,
    FLOAT32_LAST_PLACE,
    FLOAT32_ROUNDED,
    FLOAT32_SHORT,
    FLOAT32_STORED,
    FLOAT64_LAST_PLACE,
    SMALL_STEPS,
    assert_within_budget,
    patched_backend,
)
from tests.ops.backends import GPU, each, runnable
from tests.ops.devices import GPU_BACKENDS
from tests.ops.lists import one_thread, run_here, tensors  # noqa: F401

BACKENDS = each("ema_update")
HERE = runnable("ema_update")

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((), (1,), (7,), (31, 33), (0, 4), (1024,), (1025,), (2, 3, 5, 7), (2100,))
MOMENTUM = 0.99925


def case(target=torch.float32, source=torch.float32, sizes=SIZES, seed=0):
    """Targets and sources that differ by a few percent, as a teacher and its student do."""
    targets = tensors(sizes, target, seed)
    sources = [
        (t.double() * 1.03 + 0.01 * n.double()).to(source)
        for t, n in zip(targets, tensors(sizes, torch.float64, seed + 1), strict=True)
    ]
    return targets, sources


def run(backend, targets, sources, momentum=MOMENTUM, **options):
    """A copy of `targets` after one update."""
    moved = run_here(backend, targets)
    options = {k: run_here(backend, v) if isinstance(v, list) else v for k, v in options.items()}
    ema_update_(moved, run_here(backend, sources), momentum, backend=backend, **options)
    return [t.cpu() for t in moved], {
        k: [t.cpu() for t in v] for k, v in options.items() if isinstance(v, list)
    }


def oracle(targets, sources, momentum=MOMENTUM):
    return run("reference", [t.double() for t in targets], [s.double() for s in sources], momentum)[
        0
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("target", "source"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.9, MOMENTUM, 1.0])
def test_matches_the_float64_reference(backend, target, source, momentum):
    targets, sources = case(target, source)
    expected = oracle(targets, sources, momentum)
    peers = run("reference", targets, sources, momentum)[0]
    actual, _ = run(backend, targets, sources, momentum)
    for i, (a, e, p) in enumerate(zip(actual, expected, peers, strict=True)):
        assert_within_budget(f"{backend} target {i}", a, e, p)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
@pytest.mark.parametrize("copy", [None, *DTYPES])
@pytest.mark.parametrize("momentum", [0.4, MOMENTUM])
def test_kernels_equal_the_reference_bit_for_bit(backend, rounding, copy, momentum):
    for target, source in itertools.product(DTYPES, DTYPES):
        if rounding == "stochastic" and target == torch.float16:
            continue
        targets, sources = case(target, source)
        options = {"rounding": rounding}
        if copy is not None:
            options["copies"] = [torch.full(t.shape, torch.nan, dtype=copy) for t in targets]
        if rounding == "kahan":
            options["compensations"] = [1e-3 * c for c in tensors(SIZES, target, 5)]
        if rounding == "stochastic":
            options["seed"] = 12345678901
        clone = {
            k: [t.clone() for t in v] if isinstance(v, list) else v for k, v in options.items()
        }
        expected, expected_lists = run("reference", targets, sources, momentum, **clone)
        actual, actual_lists = run(backend, targets, sources, momentum, **options)
        for name, values in {"targets": actual, **actual_lists}.items():
            for i, (a, e) in enumerate(
                zip(values, {"targets": expected, **expected_lists}[name], strict=True)
            ):
                assert torch.equal(a, e), (
                    f"{name}[{i}] of {target} from {source}: "
                    f"{(a.double() - e.double()).abs().max()}"
                )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tag", ["const", "ramp"])
def test_published_updates(backend, tag, shared_dir):
    numbers = np.load(shared_dir / "golden" / "modules" / "ema.npz")
    sources = [torch.from_numpy(numbers[f"{tag}_online_{n}"]) for n in "abc"]
    targets = [torch.from_numpy(numbers[f"{tag}_target0_{n}"]) for n in "abc"]
    for step, momentum in enumerate(numbers[f"{tag}_m"].tolist()):
        targets, _ = run(backend, targets, sources, momentum)
        for n, target in zip("abc", targets, strict=True):
            np.testing.assert_allclose(
                target.numpy(), numbers[f"{tag}_target{step + 1}_{n}"], **FLOAT32_LAST_PLACE
            )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_and_fixed_point_are_exact(backend, dtype):
    targets, sources = case(dtype, dtype)
    assert all(
        torch.equal(a, s)
        for a, s in zip(run(backend, targets, sources, 0.0)[0], sources, strict=True)
    )
    assert all(
        torch.equal(a, t)
        for a, t in zip(run(backend, targets, sources, 1.0)[0], targets, strict=True)
    )
    for momentum in (0.1, 0.7, MOMENTUM):
        assert all(
            torch.equal(a, t)
            for a, t in zip(run(backend, targets, targets, momentum)[0], targets, strict=True)
        )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    momentum=st.floats(0, 1),
    steps=st.integers(1, 4),
    backend=st.sampled_from(["reference", *HERE, *(GPU_BACKENDS if GPU else ())]),
)
def test_repeated_updates_are_one_with_the_product_of_momenta(sizes, momentum, steps, backend):
    targets, sources = case(
        torch.float64 if backend in ("reference", "torch") else torch.float32,
        torch.float32,
        [(s,) for s in sizes],
    )
    sources = [s.to(t.dtype) for s, t in zip(sources, targets, strict=True)]
    moved = targets
    for _ in range(steps):
        moved, _ = run(backend, moved, sources, momentum)
    for a, t, s in zip(moved, targets, sources, strict=True):
        expected = s.double() + momentum**steps * (t.double() - s.double())
        torch.testing.assert_close(a.double(), expected, **FLOAT32)
        low, high = torch.minimum(t, s).double(), torch.maximum(t, s).double()
        slack = FLOAT32_STORED["atol"]
        assert bool(((a >= low - slack) & (a <= high + slack)).all()), (
            "an average lies between its terms"
        )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_small_update_survives_1000_steps(backend):
    """A relative step of 1e-4 is below half a unit in the last place of bfloat16: plain rounding
    loses it, the other two do not."""
    start, momentum, steps = torch.linspace(0.5, 2.0, 257), 1 - 1e-3, 1000
    source = start * 1.1
    exact = source.double() + momentum**steps * (start.double() - source.double())
    target = start.bfloat16()
    moves = {}
    for rounding in ("nearest", "kahan", "stochastic"):
        targets, sources = run_here(backend, [target.clone()]), run_here(backend, [source])
        options = {"rounding": rounding, "backend": backend}
        if rounding == "kahan":
            options["compensations"] = [torch.zeros_like(t) for t in targets]
        for step in range(steps):
            if rounding == "stochastic":
                options["seed"] = step
            ema_update_(targets, sources, momentum, **options)
        moves[rounding] = (targets[0].cpu().double() - target.double()).mean() / (
            exact - start.double()
        ).mean()
    assert moves["nearest"] == 0.0, "plain bfloat16 was expected to lose every update"
    for rounding in ("kahan", "stochastic"):
        assert abs(moves[rounding] - 1) < SMALL_STEPS["rtol"], moves


def test_stochastic_rounding_is_unbiased_and_a_function_of_seed_stream_and_element():
    values = torch.full((20_000,), 1.0 + 3 / 1024)  # 3/8 of the way from 1 to the next bfloat16
    above = []
    for seed in range(3):
        bits = stochastic.random_bits(torch.tensor(seed), 0, values.numel(), values.device)
        above.append(int((stochastic.round_bfloat16(values, bits) > 1).sum()))
        assert stats.binomtest(above[-1], values.numel(), 0.375).pvalue > 1e-3
    assert len(set(above)) == 3
    bits = stochastic.random_bits(torch.tensor(9), 4, 1000, values.device)
    assert torch.equal(bits[:500], stochastic.random_bits(torch.tensor(9), 4, 500, values.device))
    others = [
        stochastic.random_bits(torch.tensor(9), 5, 1000, values.device),
        stochastic.random_bits(torch.tensor(10), 4, 1000, values.device),
    ]
    assert all(float((bits == other).float().mean()) < 0.01 for other in others)


@pytest.fixture(scope="module")
def golden(root):
    return json.loads((root / "tests" / "golden" / "ema_update.json").read_text())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_golden_updates(backend, golden):
    for update in golden["updates"]:
        lists = {
            n: [torch.tensor(v, dtype=torch.float32) for v in update[n]]
            for n in ("targets", "sources")
        }
        moved, _ = run(backend, lists["targets"], lists["sources"], update["momentum"])
        for i, (actual, expected) in enumerate(zip(moved, update["expected"], strict=True)):
            # The inputs have three decimals and are rounded to float32, which the oracle of the
            # other tests does not see.
            torch.testing.assert_close(
                actual.double(),
                torch.tensor(expected, dtype=torch.float64),
                **FLOAT32_SHORT,
                msg=f"target {i}",
            )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_golden_random_bits(backend, golden):
    for row in golden["random"]:
        values = torch.tensor(row["values"], dtype=torch.float32)
        assert (
            stochastic.random_bits(
                torch.tensor(row["seed"]), row["stream"], 12, values.device
            ).tolist()
            == row["bits"]
        )
        # Momentum 0 makes the source the value that is rounded; the row's stream is the place in
        # the list.
        targets = [torch.zeros(12, dtype=torch.bfloat16) for _ in range(row["stream"] + 1)]
        moved, _ = run(
            backend, targets, [values] * len(targets), 0.0, rounding="stochastic", seed=row["seed"]
        )
        assert (moved[-1].view(torch.int16).long() & 0xFFFF).tolist() == row["rounded"]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_special_values(backend):
    """What is not finite stays not finite (an infinity may become NaN, as in torch.lerp), and
    nothing else becomes so."""
    special = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.38e38, 1e-45, 65504.0]
    )
    for dtype in DTYPES:
        target = special.to(dtype)
        for rounding in ("nearest", "stochastic") if dtype == torch.bfloat16 else ("nearest",):
            options = {"rounding": rounding, "seed": 3} if rounding == "stochastic" else {}
            for momentum in (1.0, 0.9, 0.5):
                moved, _ = run(backend, [target], [torch.ones_like(target)], momentum, **options)
                assert torch.equal(moved[0].isfinite(), target.isfinite()), (
                    dtype,
                    momentum,
                    moved[0],
                )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_tied_empty_and_strided_tensors(backend):
    base = run_here(backend, tensors([(6, 8, 4)], torch.float32))[0]
    sources = run_here(backend, tensors([(6, 8, 4)], torch.float32, 9))[0]
    layouts = {
        "transposed": (base.clone().transpose(0, 2), sources.clone().transpose(0, 2)),
        "transposed target": (
            base.clone().transpose(0, 1),
            sources.clone().transpose(0, 1).contiguous(),
        ),
        "sliced": (base.clone()[:, ::2], sources[:, ::2]),
        "offset": (base.clone().flatten()[1:101], sources.flatten()[3:103]),
        "channels last": (
            base.clone()[None].to(memory_format=torch.channels_last),
            sources[None].to(memory_format=torch.channels_last),
        ),
        "empty": (base[:0].clone(), sources[:0]),
    }
    expected = {
        name: t.detach().cpu().double() * 0.75 + 0.25 * s.cpu().double()
        for name, (t, s) in layouts.items()
    }
    targets, matching = [t for t, _ in layouts.values()], [s for _, s in layouts.values()]
    tied = targets[0].detach()  # another tensor object of the same memory, as state_dict() gives
    ema_update_(
        [*targets, tied, targets[2]], [*matching, matching[0], matching[2]], 0.75, backend=backend
    )
    for name, (target, _) in layouts.items():
        torch.testing.assert_close(
            target.cpu().double(),
            expected[name],
            **FLOAT32_SHORT,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_a_target_with_two_sources_is_refused():
    target = torch.zeros(3)
    with pytest.raises(ValueError, match=r"targets\[1\] must have the source of targets\[0\]"):
        ema_update_([target, target], [torch.ones(3), torch.ones(3)], 0.5)


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_strided_bfloat16_targets_round_as_contiguous_ones(backend, rounding):
    targets, sources = case(torch.bfloat16, torch.float32, [(12, 20)])
    options = (
        {"seed": 4}
        if rounding == "stochastic"
        else {"compensations": [torch.zeros(12, 20, dtype=torch.bfloat16)]}
    )
    plain, _ = run(backend, targets, sources, 0.99, rounding=rounding, **options)
    if rounding == "kahan":
        options = {"compensations": [torch.zeros(20, 12, dtype=torch.bfloat16).t()]}
    transposed, _ = run(
        backend,
        [targets[0].t().contiguous().t()],
        [sources[0].t().contiguous().t()],
        0.99,
        rounding=rounding,
        **options,
    )
    assert torch.equal(plain[0], transposed[0])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float64_targets(backend):
    targets, sources = case(torch.float64, torch.float64)
    for moved, target, source in zip(
        run(backend, targets, sources, 0.3)[0], targets, sources, strict=True
    ):
        torch.testing.assert_close(moved, 0.3 * target + 0.7 * source, **FLOAT64_LAST_PLACE)


@pytest.mark.skipif(not native.available(), reason=str(native.reason()))
def test_every_instruction_set_and_thread_count_gives_the_same_bits():
    best = native.ISAS.index(native.isa_name())
    for target, rounding in (
        (torch.float32, 0),
        (torch.bfloat16, 0),
        (torch.float16, 1),
        (torch.bfloat16, 1),
        (torch.bfloat16, 2),
    ):
        targets, sources = case(target, torch.float16, sizes=[(70_003,), (5,), (33_000,)])
        results = []
        threads = torch.get_num_threads()
        for isa, count in itertools.product(range(best + 1), (1, 2, 3)):
            moved, lost = [t.clone() for t in targets], [torch.zeros_like(t) for t in targets]
            torch.set_num_threads(count)
            try:
                torch.ops.jepa_kernels_native.ema_update_cpu_(
                    moved,
                    sources,
                    torch.tensor(0.97, dtype=torch.float64),
                    [],
                    lost,
                    [0, 1, 2],
                    rounding,
                    torch.tensor(3),
                    isa,
                )
            finally:
                torch.set_num_threads(threads)
            results.append([*moved, *lost])
        assert all(
            torch.equal(a, b)
            for other in results[1:]
            for a, b in zip(results[0], other, strict=True)
        )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_momentum_as_a_tensor_of_any_float_dtype(backend):
    targets, sources = case()
    expected, _ = run(backend, targets, sources, 0.75)
    devices = {"cpu", run_here(backend, targets[:1])[0].device.type}
    for dtype, device in itertools.product((torch.float32, torch.float64, torch.bfloat16), devices):
        actual, _ = run(backend, targets, sources, torch.tensor(0.75, dtype=dtype, device=device))
        assert all(
            torch.allclose(a, e, **FLOAT32_ROUNDED) for a, e in zip(actual, expected, strict=True)
        )


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_compiles_without_graph_breaks_or_recompiles(backend):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def update(targets, sources, momentum, seed):
        ema_update_(targets, sources, momentum, rounding="stochastic", seed=seed, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True, backend=counter)
    targets, sources = case(torch.bfloat16, torch.float32, [(3, 4), (5,)])
    targets, sources = run_here(backend, targets), run_here(backend, sources)
    eager = [t.clone() for t in targets]
    for step in range(6):
        compiled(targets, sources, torch.tensor(0.9 + step / 100), torch.tensor(step))
        update(eager, sources, torch.tensor(0.9 + step / 100), torch.tensor(step))
    assert counter.frame_count == 1
    for step in range(6):
        compiled(targets, sources, 0.9 + step / 100, step)
        update(eager, sources, 0.9 + step / 100, step)
    # A number is a constant at first, then an input: two more graphs for any number of values.
    assert counter.frame_count <= 3
    assert all(torch.equal(t, e) for t, e in zip(targets, eager, strict=True))


def test_inductor_updates_in_place():
    def update(targets, sources, copies, momentum):
        ema_update_(targets, sources, momentum, copies=copies)
        return targets[0].sum()

    targets, sources = case(sizes=[(3, 4), (5,)])
    copies = [torch.empty_like(t, dtype=torch.bfloat16) for t in targets]
    expected = run("reference", targets, sources, 0.75)[0]
    total = torch.compile(update, fullgraph=True)(targets, sources, copies, torch.tensor(0.75))
    assert all(torch.equal(t, e) for t, e in zip(targets, expected, strict=True))
    assert all(torch.equal(c, e.bfloat16()) for c, e in zip(copies, expected, strict=True))
    torch.testing.assert_close(total, expected[0].sum())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend):
    targets, sources = (
        run_here(backend, values) for values in case(torch.bfloat16, torch.float32, [(3, 4), (5,)])
    )
    momentum = torch.tensor(0.9, dtype=torch.float64)
    copies = [torch.empty_like(t) for t in targets]
    lost = [torch.zeros_like(t) for t in targets]
    for rounding, compensations, seed in (
        ("nearest", [], None),
        ("kahan", lost, None),
        ("stochastic", [], torch.tensor(1)),
    ):
        torch.library.opcheck(
            torch.ops.jepa_kernels.ema_update_.default,
            (targets, sources, momentum, copies, compensations, seed, rounding, backend),
        )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_parameters_are_updated_in_place_without_a_graph(backend):
    parameter = torch.nn.Parameter(run_here(backend, [torch.zeros(4)])[0])
    source = torch.nn.Parameter(torch.ones_like(parameter))
    version = parameter._version
    address = parameter.data_ptr()
    ema_update_([parameter], [source], 0.5, backend=backend)
    assert (
        parameter.data_ptr() == address
        and parameter.grad_fn is None
        and parameter.tolist() == [0.5] * 4
    )
    assert parameter._version > version, "autograd must see the write"


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_inference_mode(backend):
    with torch.inference_mode():
        target = run_here(backend, [torch.zeros(3)])[0]
        ema_update_([target], [torch.ones_like(target)], 0.5, backend=backend)
    assert target.tolist() == [0.5] * 3


def test_nothing_to_do():
    ema_update_([], [], 0.5)
    ema_update_([torch.empty(0)], [torch.empty(0)], 0.5)


BAD_CALLS = {
    "targets must be a list of tensors, got Tensor": lambda t, s: ema_update_(t[0], s, 0.5),
    r"sources\[1\] must be a tensor, got int": lambda t, s: ema_update_(t, [s[0], 3], 0.5),
    r"sources must have one tensor for each of targets \(2\), got 1": lambda t, s: ema_update_(
        t, s[:1], 0.5
    ),
    r"sources\[1\] must have shape \(3,\) like targets\[1\], got \(4,\)": lambda t, s: ema_update_(
        t, [s[0], torch.ones(4)], 0.5
    ),
    r"targets\[0\] must have dtype float32 or bfloat16 or .*float64, got int64": lambda t, s: (
        ema_update_([t[0].long(), t[1]], s, 0.5)
    ),
    "momentum must be from 0 to 1, got 1.5": lambda t, s: ema_update_(t, s, 1.5),
    r"momentum must be from 0 to 1, got -0.25": lambda t, s: ema_update_(t, s, torch.tensor(-0.25)),
    "momentum must be finite, got nan": lambda t, s: ema_update_(t, s, float("nan")),
    "momentum must be a number, got str": lambda t, s: ema_update_(t, s, "0.5"),
    r"momentum must be a number or a 0-d float tensor, got shape \(1,\)": lambda t, s: ema_update_(
        t, s, torch.tensor([0.5])
    ),
    "rounding must be one of nearest, kahan, stochastic, got 'up'": lambda t, s: ema_update_(
        t, s, 0.5, rounding="up"
    ),
    "seed must be given with rounding 'stochastic', got NoneType": lambda t, s: ema_update_(
        t, s, 0.5, rounding="stochastic"
    ),
    "seed must be None with rounding 'nearest', got int": lambda t, s: ema_update_(
        t, s, 0.5, seed=1
    ),
    "seed must be an int or a 0-d int64 tensor, got float": lambda t, s: ema_update_(
        t, s, 0.5, rounding="stochastic", seed=1.0
    ),
    "compensations must be given with rounding 'kahan', got NoneType": lambda t, s: ema_update_(
        t, s, 0.5, rounding="kahan"
    ),
    "copies must have one tensor for each": lambda t, s: ema_update_(t, s, 0.5, copies=[t[0]]),
    r"targets\[0\] must be bfloat16 or float32 with stochastic.*, got float16": lambda t, s: (
        ema_update_([t[0].half(), t[1]], s, 0.5, rounding="stochastic", seed=1)
    ),
    r"compensations\[0\] must have shape \(2,\) and dtype bfloat16": lambda t, s: ema_update_(
        [t[0].bfloat16(), t[1]], s, 0.5, rounding="kahan", compensations=s
    ),
    "backend must be one of": lambda t, s: ema_update_(t, s, 0.5, backend="fast"),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(message):
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.ones(3)]
    with pytest.raises((TypeError, ValueError), match=message):
        BAD_CALLS[message](targets, sources)
    assert all(bool((t == 0).all()) for t in targets)


def test_a_forced_backend_refuses_with_every_reason():
    targets, sources = [torch.zeros(2, dtype=torch.float64)], [torch.ones(2)]
    with pytest.raises(
        BackendUnsupportedError, match=r"(?s)'cuda'.*float64.*try +backend=\"torch\""
    ):
        ema_update_(targets, sources, 0.5, backend="cuda")
    assert "runs on    torch" in explain("ema_update", targets, sources, 0.5)


FAULTS = {
    "swapped weights": lambda lists, momentum: (lists, 1 - momentum),
    "wrong sign": lambda lists, momentum: ((lists[0], [-s for s in lists[1]]), momentum),
    "stale source": lambda lists, momentum: ((lists[0], [s.roll(1) for s in lists[1]]), momentum),
    "last tensor forgotten": lambda lists, momentum: ((lists[0][:-1], lists[1][:-1]), momentum),
    "last element forgotten": lambda lists, momentum: (
        ([t.flatten()[:-1] for t in lists[0]], [s.flatten()[:-1] for s in lists[1]]),
        momentum,
    ),
}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(backend, fault):
    targets, sources = case(sizes=[(40,), (9, 3)])
    expected = [0.9 * t.double() + 0.1 * s.double() for t, s in zip(targets, sources, strict=True)]
    for good, wanted in zip(run(backend, targets, sources, 0.9)[0], expected, strict=True):
        assert_within_budget("target", good, wanted)
    sound = OP.backends[backend].forward

    def faulty(inputs):
        (targets, sources), momentum = FAULTS[fault](
            (inputs.targets, inputs.sources), inputs.momentum
        )
        streams = inputs.streams[: len(targets)]
        sound(replace(inputs, targets=targets, sources=sources, momentum=momentum, streams=streams))

    with patched_backend("ema_update", backend, forward=faulty):
        actual, _ = run(backend, targets, sources, 0.9)
    with pytest.raises(AssertionError):
        for bad, wanted in zip(actual, expected, strict=True):
            assert_within_budget("target", bad, wanted)


def plain_calls() -> dict[str, tuple[bool, Any, Any]]:
    """Whether the native call that checks a list by itself takes it, targets and sources."""
    whole, other = torch.randn(3, 8), torch.randn(40)
    sparse = torch.eye(3).to_sparse()
    wide = torch.randn(2, 3, dtype=torch.float64)
    return {
        "usual": (True, [torch.randn(5), torch.randn(2, 3)], [torch.randn(5), torch.randn(2, 3)]),
        "mixed dtypes": (
            True,
            [torch.randn(5).bfloat16(), torch.randn(2, 3), torch.randn(4).half()],
            [torch.randn(5), torch.randn(2, 3).half(), torch.randn(4).bfloat16()],
        ),
        "descending addresses": (True, list(whole.clone().unbind())[::-1], list(whole.unbind())),
        "parameters": (True, [torch.nn.Parameter(torch.randn(4))], [torch.randn(4)]),
        "a scalar": (True, [torch.randn(())], [torch.randn(())]),
        "twice the same": (False, [other, other], [whole[0, :1].expand(40)] * 2),
        "transposed": (False, [torch.randn(3, 4).t()], [torch.randn(4, 3)]),
        "empty tensor": (False, [torch.randn(0), torch.randn(2)], [torch.randn(0), torch.randn(2)]),
        "another shape": (False, [torch.randn(4)], [torch.randn(2, 2)]),
        "more dimensions": (False, [torch.randn(4)], [torch.randn(4, 1)]),
        "one source less": (False, [torch.randn(4), torch.randn(4)], [torch.randn(4)]),
        "float64": (False, [wide], [wide.clone()]),
        "sparse": (False, [sparse], [sparse]),
        "on another device": (False, [torch.randn(3)], [torch.randn(3, device="meta")]),
        "overlapping in part": (False, [other[:30], other[10:]], [torch.randn(30)] * 2),
        "no list": (False, (torch.randn(3),), (torch.randn(3),)),
        "a subclass": (False, [torch.randn(3).as_subclass(Tagged)], [torch.randn(3)]),
        "a number": (False, [1.0], [torch.randn(3)]),
        "nothing": (False, [None], [torch.randn(3)]),
        "no source": (False, [torch.randn(3)], [None]),
    }


class Tagged(torch.Tensor):
    pass


@pytest.mark.skipif(not native.available(), reason=str(native.reason()))
@pytest.mark.parametrize("name", plain_calls())
def test_a_plain_call_is_the_usual_one(name):
    """Taken or left, the result, the version counters and the refusals are those of the usual
    way."""
    taken, targets, sources = plain_calls()[name]
    strided = [t for t in targets if isinstance(t, torch.Tensor) and t.layout == torch.strided]
    before = [t.detach().clone() for t in strided]
    versions = [t._version for t in strided]
    assert update_plain(targets, sources, 0.75, None) is taken
    if not taken:
        assert all(torch.equal(t, b) for t, b in zip(strided, before, strict=True))
        return
    assert all(t._version > v for t, v in zip(targets, versions, strict=True))
    with patched_backend("ema_update", "cpu"):
        ema_update_(before, sources, 0.75, backend="cpu")
    for moved, expected in zip(targets, before, strict=True):
        assert torch.equal(moved, expected)


@pytest.mark.skipif(not native.available(), reason=str(native.reason()))
def test_a_plain_call_takes_the_backend_that_is_asked_for():
    def targets_and_sources():
        return [torch.randn(4)], [torch.randn(4)]

    assert update_plain(*targets_and_sources(), 0.5, "cpu")
    assert not update_plain(*targets_and_sources(), 0.5, "reference")
    with use_backend("torch"):
        assert not update_plain(*targets_and_sources(), 0.5, None)
    with FakeTensorMode():
        assert not update_plain(*targets_and_sources(), 0.5, None)
    with torch.inference_mode():
        assert update_plain(*targets_and_sources(), 0.5, None)
    with pytest.raises(ValueError, match="be one of auto"):
        update_plain(*targets_and_sources(), 0.5, "fast")


def test_the_usual_call_is_refused_in_one_sentence():
    """Whatever it gives, in the words of the checks in Python."""
    good = [torch.zeros(3)]
    for targets, sources, argument in (
        ([1.0], good, "targets"),
        ([None], good, "targets"),
        (good, [1.0], "sources"),
        (good, [None], "sources"),
    ):
        with pytest.raises(
            TypeError, match=rf"^ema_update_: {argument}\[0\] must be a tensor, got"
        ):
            ema_update_(targets, sources, 0.5)


@pytest.mark.parametrize("name", sorted(set(BACKEND_NAMES) - set(OP.backends)))
def test_a_backend_that_only_other_ops_have_is_refused(name):
    targets, sources = [torch.zeros(3)], [torch.ones(3)]
    with pytest.raises(BackendUnsupportedError, match=f"ema_update has no {name} backend"):
        ema_update_(targets, sources, 0.5, backend=name)
    assert not targets[0].any()
