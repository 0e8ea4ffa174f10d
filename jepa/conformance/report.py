"""Golden files that know which of their arrays were read, and the record of every comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOLERANCE = 1e-5
# Relative errors mean nothing for a tensor this small: then the absolute error counts.
SMALL_NORM, SMALL_ERROR = 1e-6, 1e-7


class Golden:
    """One .npz file; an array that nobody reads is a failure of the check, not of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        with np.load(path, allow_pickle=False) as archive:
            self._arrays = {key: archive[key] for key in archive.files}
        self._unread = set(self._arrays)

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __getitem__(self, key: str) -> NDArray[Any]:
        self._unread.discard(key)
        return self._arrays[key]

    def names(self, prefix: str = "") -> list[str]:
        return [key for key in self._arrays if key.startswith(prefix)]

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        value = torch.from_numpy(np.array(self[key]))
        return value if dtype is None else value.to(dtype)

    def number(self, key: str) -> float:
        return float(self[key])

    def integer(self, key: str) -> int:
        return int(self[key])

    def triple(self, key: str) -> tuple[int, int, int]:
        first, second, third = (int(v) for v in self[key])
        return first, second, third

    def unread(self) -> list[str]:
        return sorted(self._unread)


@dataclass(frozen=True)
class Row:
    """One array compared: its relative error against what is allowed."""

    file: str
    array: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass
class Report:
    """Everything compared so far; `file` is the one being checked."""

    rows: list[Row] = field(default_factory=list)
    file: str = ""

    def compare(
        self,
        array: str,
        actual: Tensor | NDArray[Any] | float,
        expected: Any,
        tolerance: float = TOLERANCE,
    ) -> None:
        """Relative error ||a - b|| / ||b||; absolute where ||b|| is nothing. A shape or a
        non-finite value that differs is a miss."""
        self.rows.append(
            Row(self.file, array, relative_error(as_array(actual), as_array(expected)), tolerance)
        )

    def compare_up_to_kinks(
        self,
        array: str,
        actual: Tensor,
        expected: NDArray[Any],
        tolerance: float,
        kinks: int,
        loose: float,
    ) -> None:
        """As `compare`, after setting aside at most `kinks` elements: sign flips of an L1 residual
        that is zero to rounding.

        The whole tensor, kinks included, must still agree to `loose`.
        """
        value, wanted = as_array(actual), as_array(expected)
        whole = relative_error(value, wanted)
        if whole <= tolerance or value.shape != wanted.shape or whole > loose:
            self.rows.append(Row(self.file, array, whole, tolerance))
            return
        value, wanted = value.reshape(-1).copy(), wanted.reshape(-1).copy()
        worst = np.argsort(np.abs(value - wanted))[::-1][:kinks]
        value[worst] = wanted[worst]
        self.rows.append(
            Row(
                self.file,
                array,
                relative_error(value, wanted),
                tolerance,
                f"{whole:.1e} with {kinks} sign flips",
            )
        )

    def add(self, array: str, error: float, tolerance: float, note: str = "") -> None:
        """An error that was measured in another way."""
        self.rows.append(Row(self.file, array, error, tolerance, note))

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

    def by_file(self) -> dict[str, list[Row]]:
        files: dict[str, list[Row]] = {}
        for row in self.rows:
            files.setdefault(row.file, []).append(row)
        return files


def as_array(value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def relative_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    if actual.shape != expected.shape:
        return math.inf
    difference, norm = float(np.linalg.norm(actual - expected)), float(np.linalg.norm(expected))
    if not math.isfinite(difference):
        return math.inf
    if norm < SMALL_NORM:
        # On the scale of TOLERANCE, so that one table serves both rules.
        return difference / SMALL_ERROR * TOLERANCE
    return difference / norm


def worst(rows: Iterable[Row]) -> Row:
    """The row nearest to its tolerance, or furthest past it."""
    return max(rows, key=lambda row: row.error / row.tolerance if row.tolerance else row.error)
