"""Behaviour of sliced_gaussianity on every backend that runs here; the CUDA source and Triton run
in tests/simt and tests/interpret."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_kernels import (
    BackendUnsupportedError,
    explain,
    native,
    random_directions,
    sliced_gaussianity,
    use_backend,
)
from jepa_kernels.ops import products
from jepa_kernels.ops.sliced_gaussianity import blocks, directions
from jepa_kernels.ops.sliced_gaussianity.contract import OP
from jepa_kernels.ops.sliced_gaussianity.inputs import NAME
from jepa_kernels.ops.sliced_gaussianity.torch import Eager
from jepa_kernels.testing import (
    FLOAT32,
    FLOAT32_DEEP,
    FLOAT64,
    GRADCHECK,
    RESULT_FAULTS,
    assert_within_budget,
    planted_fault,
)
from jepa_kernels.testing.gaussianity import (
    FLOAT16_GRADIENT_NORM,
    SUMMED_ERROR,
    check_gaussianity,
    gaussianity_case,
    run_gaussianity,
)
from tests.conftest import missing
from tests.ops.backends import device_of, each, runnable

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / f"{NAME}.json").read_text())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HERE = ("reference", *runnable(NAME))
each_backend = pytest.mark.parametrize("backend", each(NAME))
on_this_machine = pytest.mark.parametrize("backend", HERE)
each_output = pytest.mark.parametrize("output", ["statistic", "sums"])


def place(backend: str) -> str:
    return device_of(NAME, backend)


def test_the_native_library_is_built():
    if not native.available():
        missing(str(native.reason()))
    assert "cpu" in HERE


@each_backend
@each_output
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(backend, output, dtype):
    check_gaussianity(gaussianity_case(output=output, dtype=dtype), backend, place(backend))


SHAPES = (
    {"rows": 1},
    {"rows": 3, "channels": 1, "slices": 1},
    {"rows": 2, "channels": 5, "slices": 15},
    {"rows": 9, "slices": 17, "points": 2},
    {"rows": 300, "slices": 130, "channels": 8},
    {"rows": 521, "slices": 65, "points": 9, "largest_point": 5.0},
    {"rows": 20, "points": 65, "largest_point": 6.0},
    {"rows": 33, "strided": True},
    {"rows": 50, "magnitude": 4.0, "mean": -2.0},
    {"rows": 40, "magnitude": 0.0, "mean": 0.0},
    {"rows": 40, "magnitude": 0.0, "mean": 1.7},
)


@each_backend
@each_output
@pytest.mark.parametrize(
    "options", SHAPES, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())
)
def test_shapes_layouts_and_values(backend, output, options):
    check_gaussianity(gaussianity_case(output=output, **options), backend, place(backend))


@each_backend
def test_no_rows(backend):
    features = torch.zeros(0, 6, device=place(backend), requires_grad=True)
    out = sliced_gaussianity(features, 8, backend=backend)
    assert out.item() == 0.0
    assert torch.autograd.grad(out, features)[0].shape == (0, 6)
    sums = run_gaussianity(gaussianity_case(rows=0, output="sums"), backend, device=place(backend))
    assert sums["out"].shape == (2, 16, 24)
    assert sums["out"].eq(0).all()


@each_backend
def test_large_projections_stay_accurate(backend):
    """Angles of thousands of turns, those beyond the fast reduction among them. A projection of
    size p has an error of eps * p, which is that of the angle."""
    for magnitude in (1e3, 1e5, 1e6):
        case = gaussianity_case(rows=64, channels=2, magnitude=magnitude, output="sums")
        actual = run_gaussianity(case, backend, device=place(backend))
        rounded = (case.features.float() @ case.directions.float()).double()
        angle = rounded[None] * case.largest_point / 16 * torch.arange(1, 17)[:, None, None]
        allowed = 3e-7 * angle.abs().sum(1)
        for plane, function in enumerate((torch.cos, torch.sin)):
            error = (actual["out"][plane] - function(angle).sum(1)).abs()
            assert (error <= allowed + SUMMED_ERROR).all()
            assert actual["out"][plane].abs().max() <= 64.01


@each_backend
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(backend, value):
    features = torch.randn(5, 3, device=place(backend))
    features[2, 1] = value
    assert sliced_gaussianity(features, 4, backend=backend).isnan()


@each_backend
@each_output
@pytest.mark.parametrize("slices", [64, 65, 200])
def test_blocks_of_directions(backend, output, slices, monkeypatch):
    """As with so many rows that a block has the fewest columns."""
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    case = gaussianity_case(rows=70, slices=slices, output=output)
    check_gaussianity(case, backend, place(backend))


def test_small_gradients_do_not_vanish_in_float16(monkeypatch):
    """As on a GPU, which multiplies float16: a small weight of the loss makes slopes that it cannot
    hold."""

    def rounded(a: torch.Tensor, b: torch.Tensor, operand: torch.dtype) -> torch.Tensor:
        return a.to(operand).float() @ b.to(operand).float()

    monkeypatch.setattr(blocks, "widened_on_cpus", lambda dtype: False)
    monkeypatch.setattr(products, "_product", rounded)
    case = gaussianity_case(rows=60, output="sums", dtype=torch.float16)
    inputs = OP.prepare(case.features.half(), case.directions.half())
    exact = run_gaussianity(case, "reference", torch.float64)["grad_features"]
    for weight in (1.0, 1e-9, 0.0):
        found = blocks.backward(inputs, Eager(), case.grad_out.float() * weight)
        assert (found - weight * exact).norm() <= FLOAT16_GRADIENT_NORM * weight * exact.norm()


@each_backend
def test_memory_is_that_of_a_block(backend):
    """The largest tensor of forward and backward is a block, or a gradient: never [N, S, K]."""
    rows, channels, slices = 2048, 16, 2048
    features = torch.randn(rows, channels, device=place(backend), requires_grad=True)
    columns = random_directions(channels, slices, 0, device=place(backend))

    def step() -> None:
        sliced_gaussianity(features, columns, backend=backend).backward()

    step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    most = max(
        e.self_cpu_memory_usage if place(backend) == "cpu" else e.self_device_memory_usage
        for e in profile.events()
    )
    block = blocks._BLOCK_BYTES[place(backend)]
    # Complex numbers in eager PyTorch are twice as large.
    assert most <= 2 * block
    assert 16 * most < 4 * rows * slices * 17


@each_backend
def test_repeats_bitwise(backend):
    if backend == "torch":
        pytest.skip("determinism is a promise of the kernels")
    case = gaussianity_case(rows=600, slices=100)
    first, second = (run_gaussianity(case, backend, device=place(backend)) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_kernels_give_the_same_bits_for_any_thread_count():
    if "cpu" not in HERE:
        missing(str(native.reason()))
    ops = torch.ops.jepa_kernels_native
    projections, coefficients = torch.randn(1100, 90), torch.randn(2, 16, 90)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            slope = projections.clone()
            ops.sliced_gaussianity_slope_(slope, coefficients, 0.1875, -1)
            sums = ops.sliced_gaussianity_sums(projections, 16, 0.1875, -1)
            results.append((sums, slope))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@each_output
def test_gradcheck(backend, output):
    case = gaussianity_case(5, 3, 4, output=output, dtype=torch.float64)
    features = case.features.requires_grad_()

    def call(x: torch.Tensor) -> torch.Tensor:
        inputs = replace(OP.prepare(x, case.directions), output=output)
        return OP.run(inputs, OP.backends[backend])[0]

    assert torch.autograd.gradcheck(call, (features,), **GRADCHECK)


@each_backend
@each_output
def test_opcheck(backend, output):
    forward, backward = (
        getattr(torch.ops.jepa_kernels, f"{NAME}_{way}").default for way in ("fwd", "bwd")
    )
    device = place(backend)
    features = torch.randn(6, 5, device=device)
    rest = (random_directions(5, 7, 0, device=device), 17, 3.0, output, True, backend)
    torch.library.opcheck(forward, (features.clone().requires_grad_(), *rest))
    out, saved = forward(features, *rest)
    torch.library.opcheck(
        backward,
        (torch.ones_like(out), [saved], [True], features, *rest),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    # A sum's gradient arrives expanded, with strides 0.
    expanded = torch.ones((), device=device).expand(out.shape)
    for a, b in zip(
        backward(expanded, [saved], [True], features, *rest),
        backward(torch.ones_like(out), [saved], [True], features, *rest),
        strict=True,
    ):
        assert torch.equal(a, b)


@on_this_machine
@pytest.mark.parametrize("drawn", [False, True])
def test_a_compiled_call_equals_the_eager_one(backend, drawn):
    torch._dynamo.reset()
    columns = 12 if drawn else random_directions(8, 12, 5)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sliced_gaussianity(x * 1.5, columns, seed=5, backend=backend) * 2.0

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = call(x)
        results.append((out.detach(), *torch.autograd.grad(out, x)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **FLOAT32)


@each_backend
@pytest.mark.parametrize("fault", RESULT_FAULTS)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_planted_fault_is_seen(backend, fault, phase):
    """In forward the last result is the gradient of the statistic."""
    case = gaussianity_case(output="statistic" if phase == "forward" else "sums")
    check_gaussianity(case, backend, place(backend))
    with planted_fault(NAME, backend, fault, phase), pytest.raises(AssertionError):
        check_gaussianity(case, backend, place(backend))


@on_this_machine
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{len(c['features'])} rows")
def test_golden_numbers(backend, case):
    x = torch.tensor(case["features"], requires_grad=True)
    options = {k: case[k] for k in ("points", "largest_point")}
    out = sliced_gaussianity(x, torch.tensor(case["directions"]), **options, backend=backend)
    (gradient,) = torch.autograd.grad(out, x)
    expected, wanted = (
        torch.tensor(case[k], dtype=torch.float64) for k in ("statistic", "gradient")
    )
    assert_within_budget("statistic", out.detach(), expected)
    assert_within_budget("gradient", gradient, wanted, gradient=True)


def test_two_ways_of_writing_the_published_statistic():
    """LeJEPA's code: 17 knots of [0, 3] that count twice; its paper: 17 knots of [-5, 5]."""
    x = torch.randn(50, 6, dtype=torch.float64)
    columns = random_directions(6, 10, 0, dtype=torch.float64)

    def by(time: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normal = torch.exp(-time.square() / 2)
        angle = (x @ columns)[..., None] * time
        error = (angle.cos().mean(0) - normal).square() + angle.sin().mean(0).square()
        return (error @ (weight * normal)).mean() * len(x)

    time = torch.linspace(0, 3, 17, dtype=torch.float64)
    weight = torch.full_like(time, 2 * 3 / 16)
    weight[[0, -1]] = 3 / 16
    torch.testing.assert_close(sliced_gaussianity(x, columns), by(time, weight), **FLOAT64)
    time = torch.linspace(-5, 5, 17, dtype=torch.float64)
    weight = torch.full_like(time, 10 / 16)
    weight[[0, -1]] = 5 / 16
    of_paper = sliced_gaussianity(x, columns, points=9, largest_point=5.0)
    torch.testing.assert_close(of_paper, by(time, weight), **FLOAT64)


bounded = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


@on_this_machine
@bounded
@given(seed=seeds, rows=st.integers(1, 40), channels=st.integers(1, 12), slices=st.integers(1, 40))
def test_properties(backend, seed, rows, channels, slices):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=g)
    columns = torch.randn(channels, slices, generator=g) / math.sqrt(channels)
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=g, dtype=torch.float64))[0]

    def value(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return sliced_gaussianity(x, columns, backend=backend)

    plain = value(x, columns)
    assert plain >= 0
    same = {
        "rows in another order": value(x[torch.randperm(rows, generator=g)], columns),
        "directions in another order": value(x, columns[:, torch.randperm(slices, generator=g)]),
        "mirrored": value(-x, columns),
        "turned with the directions": value(x @ rotation.float(), rotation.float().mT @ columns),
        "every row twice": value(torch.cat((x, x)), columns) / 2,
        "every direction twice": value(x, torch.cat((columns, columns), dim=1)),
    }
    for name, other in same.items():
        torch.testing.assert_close(other, plain, **FLOAT32_DEEP, msg=lambda m, n=name: f"{n}: {m}")


@on_this_machine
def test_normal_features_are_told_from_others(backend):
    normal = sliced_gaussianity(torch.randn(5000, 16), 64, backend=backend)
    for other in (torch.rand(5000, 16), torch.zeros(5000, 16), torch.randn(5000, 1).expand(-1, 16)):
        assert sliced_gaussianity(other, 64, backend=backend) > 20 * normal


# Directions.


@pytest.mark.parametrize("drawn", GOLDEN["drawn"], ids=lambda d: f"seed {d['seed']}")
@pytest.mark.parametrize("native_words", [True, False])
def test_golden_directions(drawn, native_words, monkeypatch):
    if not native_words:
        monkeypatch.setattr(directions, "is_plain", lambda tensors: False)
    elif not native.available():
        missing(str(native.reason()))
    key = drawn["seed"], drawn["step"]
    words = directions.random_words(3, *key, torch.device("cpu"))
    assert [w % 2**32 for w in words.tolist()] == drawn["words"]
    found = random_directions(3, 5, *key, dtype=torch.float64)
    expected = torch.tensor(drawn["directions"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, **FLOAT32)


def test_directions_are_uniform_on_the_sphere_and_new_at_each_step():
    columns = random_directions(8, 20_000, 11)
    torch.testing.assert_close(columns.norm(dim=0), torch.ones(20_000), **FLOAT32)
    # Standard errors: 1 / sqrt(8 * 20000) of a mean, and less of a second moment.
    assert columns.mean(1).abs().max() < 5 / math.sqrt(160_000)
    assert (columns @ columns.mT / 20_000 - torch.eye(8) / 8).abs().max() < 5 / math.sqrt(160_000)
    assert torch.equal(columns, random_directions(8, 20_000, 11))
    assert torch.equal(columns.bfloat16(), random_directions(8, 20_000, 11, dtype=torch.bfloat16))
    for other in (random_directions(8, 20_000, 12), random_directions(8, 20_000, 11, 1)):
        assert (columns * other).sum(0).mean().abs() < 5 / math.sqrt(160_000)
    x = torch.randn(9, 8)
    drawn = sliced_gaussianity(x, 7, seed=3, step=4)
    assert torch.equal(drawn, sliced_gaussianity(x, random_directions(8, 7, 3, 4)))


# Calls.


def test_autocast_takes_its_dtype():
    x, columns = torch.randn(30, 8), random_directions(8, 16, 0)
    with torch.autocast("cpu", torch.bfloat16):
        out = sliced_gaussianity(x, columns)
    assert out.dtype == torch.float32
    assert torch.equal(out, sliced_gaussianity(x.bfloat16(), columns.bfloat16()))


def test_a_gradient_that_nobody_needs_is_not_computed():
    x = torch.randn(30, 8)
    inputs = OP.prepare(x, 16)
    assert OP.run(inputs, OP.backends["torch"])[1].numel() == 0
    with torch.no_grad():
        assert not OP.prepare(x.requires_grad_(), 16).save


@pytest.mark.parametrize("backend", runnable(NAME))
def test_double_backward_is_refused(backend):
    x = torch.randn(5, 4, requires_grad=True)
    out = sliced_gaussianity(x, 3, backend=backend)
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward must not be requested"):
        gradient.sum().backward()


def test_backward_needs_what_forward_saved():
    features, columns = torch.randn(5, 4), random_directions(4, 3, 0)
    call = (features, columns, 17, 3.0, "statistic", False, "torch")
    with pytest.raises(ValueError, match="save must be True for backward, got False"):
        torch.ops.jepa_kernels.sliced_gaussianity_bwd(
            torch.ones(()), [torch.empty(0)], [True], *call
        )


def test_errors_are_one_sentence():
    x = torch.randn(4, 3)
    columns = torch.randn(3, 5)
    bad = [
        (lambda: sliced_gaussianity([1]), TypeError, "features must be a tensor, got list"),
        (lambda: sliced_gaussianity(x[0]), ValueError, "features must have 2 dimensions [N, D]"),
        (lambda: sliced_gaussianity(x.int()), ValueError, "features must have dtype float32 or"),
        (lambda: sliced_gaussianity(x[:, :0]), ValueError, "directions must be at least 1, of"),
        (lambda: sliced_gaussianity(x, 0), ValueError, "directions must be at least 1, of"),
        (lambda: sliced_gaussianity(x, 1.5), TypeError, "directions must be a tensor [D, S] or a"),
        (lambda: sliced_gaussianity(x, columns.double()), ValueError, "directions must have the"),
        (lambda: sliced_gaussianity(x, columns[:2]), ValueError, "directions must have shape [3"),
        (lambda: sliced_gaussianity(x, columns[:, :0]), ValueError, "directions must have shape"),
        (lambda: sliced_gaussianity(x, columns, points=1), ValueError, "points must be at least 2"),
        (lambda: sliced_gaussianity(x, columns, points=2.0), TypeError, "points must be an int"),
        (
            lambda: sliced_gaussianity(x, columns, largest_point=0),
            ValueError,
            "largest_point must be above 0, got 0",
        ),
        (
            lambda: sliced_gaussianity(x, columns, largest_point=math.inf),
            ValueError,
            "largest_point must be finite",
        ),
        (lambda: sliced_gaussianity(x, 2, seed=-1), ValueError, "seed must be at least 0, got -1"),
        (lambda: sliced_gaussianity(x, 2, seed=2**63), ValueError, "seed must be below"),
        (lambda: sliced_gaussianity(x, 2, step=None), TypeError, "step must be an int"),
        (lambda: sliced_gaussianity(x, 2, group="all"), TypeError, "group must be a ProcessGroup"),
        (lambda: random_directions(0, 3, 0), ValueError, "channels must be at least 1, got 0"),
    ]
    for call, kind, text in bad:
        with pytest.raises(kind) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"{NAME}: {text}"), message
        assert message.endswith("."), message


def test_a_refusal_names_the_reason():
    if "cpu" not in HERE:
        missing(str(native.reason()))
    x = torch.randn(4, 3)
    with pytest.raises(BackendUnsupportedError, match="points must be at most 65, got 66"):
        sliced_gaussianity(x, 5, points=66, backend="cpu")
    with use_backend("cpu"), pytest.raises(BackendUnsupportedError, match="got float64"):
        sliced_gaussianity(x.double(), 5)
    assert sliced_gaussianity(x, 5, points=66).isfinite()  # auto finds torch
    text = explain(NAME, x, 5)
    assert "runs on    cpu (auto)" in text
    assert "5 directions; 17 points up to 3, returns statistic" in text
