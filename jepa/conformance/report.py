"""The record of every comparison with a golden array."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from jepa.conformance.golden import Golden

TOLERANCE = 1e-5
# Of gradients and of what an optimiser makes of them: its rounding is that of two passes.
GRADIENT_TOLERANCE = 1e-4
# Relative errors mean nothing for a tensor this small: then the absolute error counts.
SMALL_NORM, SMALL_ERROR = 1e-6, 1e-7

# What of a tensor is compared: its elements, or one number made of them.
Statistic = Literal["elements", "norm", "sum"]


@dataclass(frozen=True)
class Comparison:
    """One array of the code under test and what it should be.

    Attributes:
        actual: the elements, flat, float64.
        expected: the published elements, flat; or the published statistic, one number.
        tolerance: the fixed one, relative to `scale`.
        scale: what errors are measured in.
        statistic: what is compared.
    """

    actual: NDArray[np.float64]
    expected: NDArray[np.float64]
    tolerance: float
    scale: float
    statistic: Statistic

    def error(self) -> float:
        if self.statistic != "elements":
            return self.distance(self.expected.item())
        if self.actual.shape != self.expected.shape:
            return math.inf
        return self.distance(self.expected)

    def distance(self, other: NDArray[np.float64] | float) -> float:
        """From the actual elements, or their statistic, to others."""
        if self.statistic == "elements":
            gap = float(np.linalg.norm(self.actual - other))
        else:
            gap = abs(self.reduced(self.actual) - float(other))
        return gap / self.scale if math.isfinite(gap) else math.inf

    def reduced(self, elements: NDArray[np.float64]) -> float:
        """The statistic of a tensor."""
        return float(elements.sum() if self.statistic == "sum" else np.linalg.norm(elements))


@dataclass(frozen=True)
class Row:
    """One array compared: its error against what is allowed.

    Attributes:
        file, array: which.
        error, tolerance: relative.
        note: why, where that is not plain.
        noise: where the fixed tolerance was not enough, the measured noise; else None.
        undecided: how many elements rounding decides (see `jepa.conformance.sensitivity`).
    """

    file: str
    array: str
    error: float
    tolerance: float
    note: str = ""
    noise: float | None = None
    undecided: int = 0

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass
class Report:
    """Everything compared so far; `file` is the one being checked.

    `outside` holds the comparisons of that file which miss their fixed tolerance, by array.
    """

    rows: list[Row] = field(default_factory=list)
    file: str = ""
    outside: dict[str, Comparison] = field(default_factory=dict)

    def open(self, file: str) -> None:
        """Begins with another file."""
        self.file = file
        self.outside.clear()

    def compare(
        self,
        array: str,
        actual: Tensor | NDArray[Any] | float,
        expected: Any,
        tolerance: float = TOLERANCE,
    ) -> None:
        """Relative error ||a - b|| / ||b||; absolute where ||b|| is nothing. A shape or a
        non-finite value that differs is a miss."""
        value, wanted = as_array(actual), as_array(expected)
        if value.shape != wanted.shape:
            self.miss(array, f"expected shape {wanted.shape}, got {value.shape}")
            return
        scale = error_scale(wanted)
        self.add(array, Comparison(value.ravel(), wanted.ravel(), tolerance, scale, "elements"))

    def compare_norm(
        self, array: str, actual: Tensor, expected: float, tolerance: float = GRADIENT_TOLERANCE
    ) -> None:
        """The error of a tensor's norm, relative to the norm."""
        self._add_statistic(array, actual, expected, expected, tolerance, "norm")

    def compare_sum(
        self,
        array: str,
        actual: Tensor,
        expected: float,
        norm: float,
        tolerance: float = GRADIENT_TOLERANCE,
    ) -> None:
        """The error of a sum, which is a difference of large numbers, relative to what so many
        numbers of this norm can add up to: sqrt(n) * norm."""
        self._add_statistic(array, actual, expected, norm, tolerance, "sum")

    def _add_statistic(
        self,
        array: str,
        actual: Tensor,
        expected: float,
        norm: float,
        tolerance: float,
        statistic: Statistic,
    ) -> None:
        value = as_array(actual).ravel()
        scale = max(float(norm), SMALL_NORM)
        if statistic == "sum":
            scale *= math.sqrt(value.size)
        wanted = np.array([expected], dtype=np.float64)
        self.add(array, Comparison(value, wanted, tolerance, scale, statistic))

    def add(self, array: str, comparison: Comparison) -> None:
        """Judges a comparison by its fixed tolerance."""
        row = Row(self.file, array, comparison.error(), comparison.tolerance)
        self.rows.append(row)
        if not row.passed:
            self.outside[array] = comparison

    def settle(self, row: Row) -> None:
        """Puts a row in the place of the one of the same file and array."""
        place = max(
            index
            for index, other in enumerate(self.rows)
            if (other.file, other.array) == (row.file, row.array)
        )
        self.rows[place] = row

    def equal(self, array: str, actual: object, expected: object) -> None:
        """For what is not a number: flags, names, shapes, absent gradients."""
        same = actual == expected
        self.rows.append(
            Row(
                self.file,
                array,
                0.0 if same else math.inf,
                0.0,
                "" if same else f"expected {expected}, got {actual}",
            )
        )

    def gradient(
        self, golden: Golden, name: str, actual: Tensor | None, tolerance: float = TOLERANCE
    ) -> None:
        """Compares a gradient with ``grad_NAME``, or its absence with ``grad_is_none_NAME``."""
        none = f"grad_is_none_{name}"
        if none in golden:
            self.equal(none, actual is None, bool(golden[none]))
        if f"grad_{name}" in golden and actual is not None:
            self.compare(f"grad_{name}", actual, golden[f"grad_{name}"], tolerance)

    def miss(self, array: str, note: str) -> None:
        self.rows.append(Row(self.file, array, math.inf, 0.0, note))

    def finish(self, golden: Golden) -> None:
        for key in golden.unread():
            self.miss(key, "not read: unknown key")

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]

    @property
    def measured(self) -> list[Row]:
        """The rows that passed by their measured noise."""
        return [row for row in self.rows if row.passed and row.noise is not None]

    def by_file(self) -> dict[str, list[Row]]:
        files: dict[str, list[Row]] = {}
        for row in self.rows:
            files.setdefault(row.file, []).append(row)
        return files


def as_array(value: Any) -> NDArray[np.float64]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return np.array(value, dtype=np.float64)


def error_scale(expected: NDArray[np.float64]) -> float:
    """What the error of an array is measured in: its norm. Where that is nothing, an absolute
    error of SMALL_ERROR counts as a relative one of TOLERANCE, so that one table serves both."""
    norm = float(np.linalg.norm(expected))
    return norm if norm >= SMALL_NORM else SMALL_ERROR / TOLERANCE


def worst(rows: Iterable[Row]) -> Row:
    """The row nearest to its tolerance, or furthest past it."""
    return max(rows, key=lambda row: row.error / row.tolerance if row.tolerance else row.error)
