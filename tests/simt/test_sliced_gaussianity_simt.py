"""The CUDA kernels of sliced_gaussianity on the SIMT executor, in every thread order, sanitized."""

from __future__ import annotations

import shutil

import pytest
import torch

from jepa_kernels.ops.sliced_gaussianity import blocks
from jepa_kernels.testing import FLOAT32_NEAR_ZERO, assert_within_budget
from jepa_kernels.testing.gaussianity import check_gaussianity, gaussianity_case, run_gaussianity
from tests.simt.build import ORDERS, ROOT, build, configure, run_sanitized, take_counts
from tests.simt.gaussianity_abi import MOST_KNOTS, Library, Ops, on_the_executor, run_on

SOURCE = "csrc/sliced_gaussianity/cuda/launch.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_output = pytest.mark.parametrize("output", ["statistic", "sums"])


@pytest.fixture(scope="module")
def library() -> Library:
    return on_the_executor(build(SOURCE))


@pytest.fixture
def cuda(monkeypatch, library) -> Library:
    """Lets the CUDA backend run on the executor."""
    run_on(monkeypatch, "cuda", library)
    return library


@pytest.mark.parametrize("order", sorted(ORDERS))
@each_output
def test_matches_the_reference_in_every_thread_order(cuda, order, output):
    configure(cuda.library, order, seed=3)
    check_gaussianity(gaussianity_case(rows=150, slices=37, output=output), "cuda")
    configure(cuda.library)


@each_output
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(cuda, output, dtype):
    check_gaussianity(gaussianity_case(output=output, dtype=dtype), "cuda")


@each_output
@pytest.mark.parametrize(
    "options",
    [
        {"rows": 1, "channels": 1, "slices": 1},
        {"rows": 3, "slices": 33, "points": 2},
        {"rows": 128, "slices": 32},
        {"rows": 129, "slices": 31, "points": 9, "largest_point": 5.0},
        {"rows": 9, "slices": 3, "points": MOST_KNOTS + 1, "largest_point": 6.0},
        {"rows": 20, "magnitude": 0.0, "mean": 1.7},
    ],
    ids=str,
)
def test_shapes_and_values(cuda, output, options):
    check_gaussianity(gaussianity_case(output=output, **options), "cuda")


def test_blocks_of_directions(cuda, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    for output in ("statistic", "sums"):
        check_gaussianity(gaussianity_case(rows=9, slices=130, output=output), "cuda")


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e9])
def test_large_projections(cuda, magnitude):
    """Angles below and above the limit of the reduction in float32."""
    case = gaussianity_case(rows=20, channels=1, slices=3, magnitude=magnitude, output="sums")
    actual = run_gaussianity(case, "cuda")["out"]
    first = (case.features.float() @ case.directions.float()) * 0.1875
    expected = torch.polar(torch.ones((), dtype=torch.float64), first.double()).sum(0)
    for plane, part in enumerate((expected.real, expected.imag)):
        torch.testing.assert_close(actual[plane, 0].double(), part, **FLOAT32_NEAR_ZERO)


def test_numbers_without_an_angle_stay_numbers_and_others_do_not(library):
    ops = Ops(library)
    far = torch.tensor([[1e30], [-3e38]])
    sums = ops.sliced_gaussianity_sums(far, 3, 0.5, -1)
    assert sums.abs().max() <= 2.0
    pieces, knots = 1, 2
    for value in (torch.inf, torch.nan):
        out = torch.zeros(pieces, 2, knots, 1)
        library.call(
            "sums",
            rows=1,
            columns=1,
            knots=knots,
            spacing=0.5,
            projections=torch.tensor([[value]]),
            sums=out,
            pieces=pieces,
            piece_rows=128,
        )
        assert out.isnan().all()


def test_one_launch_each_and_repeats_bitwise(library):
    ops, u = Ops(library), torch.randn(300, 40)
    take_counts(library.library)
    first, second = (ops.sliced_gaussianity_sums(u, 16, 0.1875, -1) for _ in range(2))
    assert take_counts(library.library).launches == 2
    assert torch.equal(first, second)
    assert first.shape[0] == 3  # pieces of 128 rows


def test_too_many_knots_are_refused(library):
    with pytest.raises(RuntimeError, match="knots must be from 1 to 64"):
        library.call("sums", rows=1, columns=1, knots=MOST_KNOTS + 1)


def test_a_planted_fault_is_noticed(tmp_path, monkeypatch):
    """The same comparison with one sign of a kernel flipped."""
    shutil.copytree(ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "sliced_gaussianity" / "cuda" / "harmonics.cuh"
    text = path.read_text()
    sound = "fmaf(x, z[r].sine, y * z[r].cosine)"
    assert sound in text
    path.write_text(text.replace(sound, "fmaf(x, z[r].sine, -(y * z[r].cosine))"))
    broken = on_the_executor(build(path.with_name("launch.cu")))
    u, c = torch.randn(7, 5), torch.randn(2, 4, 5)
    run_on(monkeypatch, "cuda", broken)
    with pytest.raises(AssertionError):
        check_gaussianity(gaussianity_case(), "cuda")
    angle = u.double()[None] * 0.5 * torch.arange(1, 5)[:, None, None]
    exact = (c[1][:, None] * angle.cos() - c[0][:, None] * angle.sin()).sum(0)
    Ops(broken).sliced_gaussianity_slope_(u, c, 0.5, -1)
    with pytest.raises(AssertionError):
        assert_within_budget("slope", u, exact, gradient=True)


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(sanitizer):
    script = ROOT / "tests" / "simt" / "gaussianity_sanitized.py"
    done = run_sanitized([str(script), str(build(SOURCE, sanitizer)), "cuda"], sanitizer)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
