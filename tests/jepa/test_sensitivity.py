"""Measured tolerances: rounding passes, faults do not, not even of code that amplifies rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jepa.conformance.golden import ULPS, Run
from jepa.conformance.report import Report, Row
from jepa.conformance.sensitivity import CEILING, KINK, MULTIPLE, check_measured, undecided_limit

EPS = float(np.finfo(np.float32).eps)
SIZE = 400


def inputs() -> torch.Tensor:
    return torch.linspace(1.0, 2.0, SIZE)


def settled(results, expected, statistic: str = "elements") -> Row:
    """The row of an array that is `results(moved inputs)`."""
    report = Report()

    def check(run: Run, report: Report) -> None:
        value = results(run.moved(inputs(), "inputs"))
        if statistic == "elements":
            report.compare("array", value, expected)
        elif statistic == "norm":
            report.compare_norm("array", value, float(np.linalg.norm(expected)))
        else:
            report.compare_sum("array", value, float(expected.sum()), np.linalg.norm(expected))

    check_measured(check, report)
    (row,) = report.rows
    return row


def differences(amplified: float):
    """Large numbers of which only the difference is left: rounding grows by a factor."""
    return lambda x: (x * amplified - inputs().to(x) * amplified) + inputs().to(x)


def exact() -> np.ndarray:
    return inputs().double().numpy()


def test_moves_are_a_few_units_in_the_last_place_and_opposite():
    x = torch.rand(1000) + 0.5
    up, down = (Run(seed=3, sign=sign).moved(x, "x") for sign in (1, -1))
    moves = (up.double() - x.double()) / (x.double() * EPS)
    assert moves.abs().max() <= ULPS + 1
    assert moves.abs().mean() > 1
    assert ((up.double() + down.double()) / 2 - x.double()).abs().le(EPS * x.double()).all()
    assert not torch.equal(up, Run(seed=4).moved(x, "x"))
    assert not torch.equal(up, Run(seed=3).moved(x, "y"))
    assert torch.equal(Run().moved(x, "x"), x)
    assert Run(dtype=torch.float64).moved(x, "x").dtype == torch.float64
    ids = torch.arange(5)
    assert Run(seed=3).moved(ids, "ids") is ids


def test_an_array_within_the_fixed_tolerance_is_not_measured():
    runs = []

    def check(run: Run, report: Report) -> None:
        runs.append(run)
        report.compare("array", inputs(), exact() * (1 + 5e-6))

    check_measured(check, Report())
    assert runs == [Run()]


@pytest.mark.parametrize(
    ("statistic", "amplified", "near", "far"),
    [("elements", 2e2, 7e-5, 2e-3), ("norm", 5e3, 2e-4, 3e-3), ("sum", 5e3, 2e-4, 3e-3)],
)
def test_noise_is_allowed_and_a_multiple_of_it_is_not(statistic, amplified, near, far):
    """Noise is about 5e-5 in each case."""
    row = settled(differences(amplified), exact() * (1 + near), statistic)
    assert row.passed
    assert row.noise is not None
    row = settled(differences(amplified), exact() * (1 + far), statistic)
    assert not row.passed
    assert row.tolerance == MULTIPLE * row.noise < CEILING


def test_sensitive_code_is_held_to_the_ceiling():
    row = settled(differences(5e3), exact() * (1 + 1.02 * CEILING))
    assert row.noise * MULTIPLE > CEILING
    assert row.tolerance == CEILING
    assert not row.passed


def test_code_that_is_nothing_but_noise_fails_in_every_statistic():
    for statistic in ("elements", "norm", "sum"):
        row = settled(differences(1e6), exact() * (1 + 3 * CEILING), statistic)
        assert not row.passed, statistic
        assert row.undecided > undecided_limit(SIZE) or not row.undecided


def kinked(x: torch.Tensor, kinks: int) -> torch.Tensor:
    """Signs of residuals, `kinks` of which are zero but for rounding."""
    residual = x.clone()
    residual[:kinks] -= inputs().to(x)[:kinks] * (1 + EPS)
    return residual.sign() * 0.5


def test_kinks_are_set_aside_and_counted():
    expected = np.full(SIZE, 0.5)
    expected[0] = -0.5
    row = settled(lambda x: kinked(x, 1), np.where(np.arange(SIZE) == 0, 0.5, expected))
    assert row.passed
    assert row.undecided == 1
    assert "1 of 400 elements undecided" in row.note


def test_a_kink_excuses_no_other_element_and_no_other_value():
    expected = np.full(SIZE, 0.5)
    elsewhere = expected.copy()
    elsewhere[7] = -0.5
    beyond = expected.copy()
    beyond[0] = 2.5
    assert not settled(lambda x: kinked(x, 1), elsewhere).passed
    assert not settled(lambda x: kinked(x, 1), beyond).passed


def test_more_kinks_than_a_share_are_a_fault():
    limit = undecided_limit(SIZE)
    row = settled(lambda x: kinked(x, limit + 8), np.full(SIZE, 0.5))
    assert not row.passed
    assert undecided_limit(1) == 0
    assert limit == 32
    assert undecided_limit(10_000) == 100
    assert KINK < 1


def test_a_fault_of_float32_alone_is_told_by_float64():
    """The published number happens to lie where the faulty code puts it."""

    def results(x: torch.Tensor) -> torch.Tensor:
        value = differences(1e3)(x)
        return value if x.dtype == torch.float64 else value * (1 + 4e-3)

    row = settled(results, exact() * (1 + 4e-3) * (1 + 2e-5))
    assert row.noise > 2e-5
    assert not row.passed
    assert "float64 is" in row.note


def test_what_no_noise_explains_is_not_measured():
    runs = []

    def check(run: Run, report: Report) -> None:
        runs.append(run)
        report.compare("array", inputs(), -exact())

    report = Report()
    check_measured(check, report)
    assert runs == [Run()]
    assert len(report.failures) == 1
