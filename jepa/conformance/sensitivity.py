"""How far rounding alone moves the results of a check, measured, and what that allows.

Two right implementations round differently, and so do two processors. Most arrays then differ by
1e-7, a few by much more: sums whose terms cancel, AdamW's first moves g / |g| on gradients that are
nothing but rounding, gradients of |x| at x = 0. Which ones depends on the numbers, so it is
measured. Where an array misses its fixed tolerance, the check is run again: in float32 with every
input, every weight and every published gradient that it passes on moved by a few units in the last
place, one seed after another and with both signs, and once in float64 on the reference backend.
(Parker's "Monte Carlo Arithmetic", 1997, with the moves at the inputs alone.)

- The noise of an array is its largest distance from the plain run over the moved runs. The array
  passes within MULTIPLE times its noise, but never beyond CEILING of its own norm.
- An element is undecided where it spreads over the runs by more than KINK of the array's root mean
  square: a kink, which falls to one side or the other. Such elements must lie within their spread
  around what the runs gave, are left out of the error of the others, and are counted in the report.
  Of a sum or norm of weights they raise the ceiling by what they can account for.
- The float64 run must lie as near to the plain run as the published array. Moved runs share the
  faults of the float32 code; float64 goes another way.
- At most UNDECIDED_SHARE of the elements may be undecided; of a small array UNDECIDED_SMALL of
  them, up to UNDECIDED_FEW. So an array is wrong, whatever its noise, if it is still beyond the
  ceiling without that many of its worst elements. Then nothing is measured.

Noise can only be as large as the code under test makes it, so the ceiling is what bounds a faulty
code that is also sensitive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jepa.conformance.golden import Run
from jepa.conformance.report import Comparison, Report, Row

MULTIPLE = 4.0
CEILING = 5e-3
KINK = 1e-2
UNDECIDED_SHARE, UNDECIDED_SMALL, UNDECIDED_FEW = 0.01, 0.25, 32
SEEDS = 8

# Runs a check and reports to what it is given.
Check = Callable[[Run, Report], Any]


def check_measured(check: Check, report: Report) -> Any:
    """Runs a check, then settles by their measured noise the arrays that miss their fixed
    tolerance.

    Args:
        check: a function of the run and of the report, which calls the code under test on inputs
            that `Golden.tensor` gives for that run.
        report: gets the rows; `report.open` has named the file.

    Returns:
        What `check` returned on the plain run.
    """
    result = check(Run(), report)
    outside = dict(report.outside)
    if outside and not any(beyond_rounding(comparison) for comparison in outside.values()):
        _settle(check, report, outside)
    return result


def undecided_limit(elements: int) -> int:
    """How many of so many elements may be undecided."""
    return int(max(UNDECIDED_SHARE * elements, min(UNDECIDED_SMALL * elements, UNDECIDED_FEW)))


def beyond_rounding(comparison: Comparison) -> bool:
    """Whether no noise could make an array pass."""
    if not np.isfinite(comparison.actual).all():
        return True
    if comparison.statistic != "elements":
        return False
    gaps = np.sort(np.abs(comparison.actual - comparison.expected))
    kept = gaps[: gaps.size - undecided_limit(gaps.size)]
    return float(np.linalg.norm(kept)) / comparison.scale > max(CEILING, comparison.tolerance)


def _settle(check: Check, report: Report, outside: dict[str, Comparison]) -> None:
    wide = _values(check, Run(dtype=torch.float64), outside)
    moved: list[Mapping[str, NDArray[np.float64]]] = []
    for seed in range(SEEDS):
        moved += [_values(check, Run(seed=seed, sign=sign), outside) for sign in (1, -1)]
        for array, comparison in list(outside.items()):
            row = judged(report.file, array, comparison, [run[array] for run in moved], wide[array])
            report.settle(row)
            if row.passed:
                del outside[array]
        if not outside:
            return


def judged(
    file: str,
    array: str,
    comparison: Comparison,
    moved: Sequence[NDArray[np.float64]],
    wide: NDArray[np.float64],
) -> Row:
    """The row of an array that misses its fixed tolerance.

    Args:
        file, array: for the row.
        comparison: of the plain run.
        moved: the elements in every moved run.
        wide: the elements in the float64 run.
    """
    plain = comparison.actual
    runs = np.stack([plain, *moved])
    if not np.isfinite(runs).all():
        return Row(file, array, np.inf, comparison.tolerance, "not finite")
    low, high = runs.min(0), runs.max(0)
    spread = high - low
    undecided = spread > KINK * np.sqrt(np.square(plain).mean())
    count = int(undecided.sum())
    limit = undecided_limit(plain.size)
    if comparison.statistic == "elements":
        if count > limit:
            note = f"{count} of {plain.size} elements undecided, at most {limit} may be"
            return Row(file, array, comparison.error(), comparison.tolerance, note)

        def distance(other: NDArray[np.float64]) -> float:
            within = (other >= low - spread) & (other <= high + spread)
            if not within[undecided].all():
                return np.inf
            return comparison.distance(np.where(undecided, plain, other))

        ceiling = CEILING
        noise = max(comparison.distance(np.where(undecided, plain, run)) for run in moved)
        error, wide_error = distance(comparison.expected), distance(wide)
    else:
        reach = comparison.reduced(spread[undecided]) / comparison.scale
        ceiling = CEILING + (reach if count <= limit else 0.0)
        noise = max(comparison.distance(comparison.reduced(run)) for run in moved)
        error = comparison.error()
        wide_error = comparison.distance(comparison.reduced(wide))
    allowed = max(comparison.tolerance, min(MULTIPLE * noise, ceiling))
    note = f"noise {noise:.1e} over {len(moved)} runs"
    if count:
        note += f", {count} of {plain.size} elements undecided"
    if wide_error > allowed >= error:
        note += f"; float64 is {wide_error:.1e} away"
        error = wide_error
    return Row(file, array, error, allowed, note, noise, count)


def _values(
    check: Check, run: Run, wanted: Mapping[str, Comparison]
) -> dict[str, NDArray[np.float64]]:
    recorder = _Recorder(wanted)
    check(run, recorder)
    return recorder.values


class _Recorder(Report):
    """Keeps the elements of the wanted arrays and judges nothing."""

    def __init__(self, wanted: Mapping[str, Comparison]) -> None:
        super().__init__()
        self.wanted = wanted
        self.values: dict[str, NDArray[np.float64]] = {}

    def add(self, array: str, comparison: Comparison) -> None:
        if array in self.wanted:
            self.values[array] = comparison.actual

    def equal(self, array: str, actual: object, expected: object) -> None:
        pass

    def miss(self, array: str, note: str) -> None:
        pass
