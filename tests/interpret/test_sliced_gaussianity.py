"""The Triton kernels of sliced_gaussianity under the interpreter."""

from __future__ import annotations

import pytest
import torch

from jepa_kernels import sliced_gaussianity
from jepa_kernels.ops.sliced_gaussianity import blocks, triton
from jepa_kernels.ops.sliced_gaussianity.inputs import NAME
from jepa_kernels.testing import FLOAT32_NEAR_ZERO, RESULT_FAULTS, planted_fault
from jepa_kernels.testing.gaussianity import check_gaussianity, gaussianity_case, run_gaussianity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_output = pytest.mark.parametrize("output", ["statistic", "sums"])


@each_output
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(output, dtype):
    check_gaussianity(gaussianity_case(output=output, dtype=dtype), "triton")


@each_output
@pytest.mark.parametrize(
    "options",
    [
        {"rows": 0},
        {"rows": 1, "channels": 1, "slices": 1},
        {"rows": triton.ROWS, "slices": triton.COLUMNS, "points": 2},
        {"rows": triton.ROWS + 1, "slices": triton.COLUMNS + 1, "points": 9, "largest_point": 5.0},
        {"rows": 12, "points": 70, "largest_point": 6.0},
        {"rows": 20, "magnitude": 0.0, "mean": 1.7},
    ],
    ids=str,
)
def test_shapes_and_values(output, options):
    check_gaussianity(gaussianity_case(output=output, **options), "triton")


def test_blocks_of_directions(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    for output in ("statistic", "sums"):
        check_gaussianity(gaussianity_case(rows=9, slices=130, output=output), "triton")


@pytest.mark.parametrize("magnitude", [1e3, 1e5, 1e9])
def test_large_projections(magnitude):
    """Angles below and above the limit of the reduction in float32."""
    case = gaussianity_case(rows=20, channels=1, slices=3, magnitude=magnitude, output="sums")
    actual = run_gaussianity(case, "triton")["out"]
    first = (case.features.float() @ case.directions.float()) * 0.1875
    expected = torch.polar(torch.ones((), dtype=torch.float64), first.double()).sum(0)
    torch.testing.assert_close(actual[0, 0].double(), expected.real, **FLOAT32_NEAR_ZERO)
    torch.testing.assert_close(actual[1, 0].double(), expected.imag, **FLOAT32_NEAR_ZERO)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_numbers_without_an_angle_stay_numbers_and_others_do_not():
    x = torch.full((3, 2), 1e30)
    assert 0 <= sliced_gaussianity(x, 4, backend="triton") < 10 * 3
    for value in (torch.inf, torch.nan):
        x[1, 0] = value
        assert sliced_gaussianity(x, 4, backend="triton").isnan()


def test_repeats_bitwise():
    case = gaussianity_case(rows=200)
    first, second = (run_gaussianity(case, "triton") for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("fault", RESULT_FAULTS)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_planted_fault_is_seen(fault, phase):
    case = gaussianity_case(output="statistic" if phase == "forward" else "sums")
    with planted_fault(NAME, "triton", fault, phase), pytest.raises(AssertionError):
        check_gaussianity(case, "triton")
