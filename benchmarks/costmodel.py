"""How time and memory grow with the number of tokens: step(B, N) = a + b B N + c B N^2, fitted per
variant and phase.

a is what a step costs whatever its size (launches, optimiser, Python), b what each token costs
(linear layers, norms, losses), c what each pair of tokens of a clip costs (attention). The
coefficients are least squares on relative error with none negative, so that a large resolution
cannot buy its fit with a negative constant. `holdout` predicts the largest resolution from the
smaller ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

PATTERNS = (("constant", (1, 0, 0)), ("linear", (0, 1, 0)), ("quadratic", (0, 0, 1)))


@dataclass(frozen=True)
class Fit:
    """Coefficients in the unit of the data (seconds or bytes); `points` is how many sizes they rest
    on."""

    constant: float
    per_token: float
    per_pair: float
    points: int
    worst_error: float

    def predict(self, tokens: float, batch: float) -> float:
        return (
            self.constant
            + self.per_token * batch * tokens
            + self.per_pair * batch * tokens * tokens
        )

    def exponent(self, tokens: float, batch: float) -> float:
        """d log(step) / d log(tokens) at this size: 0 where constant, 1 where linear, 2 where
        attention rules."""
        linear, square = self.per_token * batch * tokens, self.per_pair * batch * tokens * tokens
        total = self.constant + linear + square
        return (linear + 2.0 * square) / total if total > 0 else 0.0

    @property
    def crossover_tokens(self) -> float | None:
        """Tokens per clip at which the quadratic part equals the linear one; None where either is
        absent."""
        return self.per_token / self.per_pair if self.per_pair > 0 and self.per_token > 0 else None

    def as_dict(self) -> dict[str, float | int | None]:
        return {
            "constant": self.constant,
            "per_token": self.per_token,
            "per_pair": self.per_pair,
            "points": self.points,
            "worst_error": self.worst_error,
            "crossover_tokens": self.crossover_tokens,
        }


def fit(tokens: Sequence[float], batch: Sequence[float], values: Sequence[float]) -> Fit:
    """Non-negative least squares on relative error.

    Raises:
        ValueError: no point, unequal lengths, or a value that is not positive.
    """
    count = len(values)
    if not count or len(tokens) != count or len(batch) != count:
        raise ValueError(
            "costmodel: tokens, batch and values must have one equal positive length, got "
            f"{len(tokens)}, {len(batch)}, {count}."
        )
    measured = np.asarray(values, dtype=np.float64)
    if not (measured > 0).all():
        raise ValueError("costmodel: values must be positive.")
    size, clips = np.asarray(tokens, dtype=np.float64), np.asarray(batch, dtype=np.float64)
    design = (
        np.stack([np.ones(count), clips * size, clips * size * size], axis=1) / measured[:, None]
    )
    scale = np.abs(design).max(axis=0)
    solution, _ = nnls(design / scale, np.ones(count))
    best = solution / scale
    errors = np.abs(design @ best - 1.0)
    return Fit(float(best[0]), float(best[1]), float(best[2]), count, float(errors.max()))


@dataclass(frozen=True)
class Holdout:
    """The largest size, predicted from the smaller ones."""

    tokens: float
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Signed relative error of the prediction."""
        return self.predicted / self.measured - 1.0


def holdout(
    tokens: Sequence[float], batch: Sequence[float], values: Sequence[float]
) -> Holdout | None:
    """None with fewer than three sizes: two points and a prediction of a third is the least that
    checks anything."""
    if len(set(tokens)) < 3:
        return None
    order = np.argsort(tokens)
    largest = order[-1]
    rest = [i for i in order if tokens[i] < tokens[largest]]
    made = fit([tokens[i] for i in rest], [batch[i] for i in rest], [values[i] for i in rest])
    return Holdout(tokens[largest], values[largest], made.predict(tokens[largest], batch[largest]))


def slopes(tokens: Sequence[float], values: Sequence[float]) -> list[float | None]:
    """Local exponent at each size, from its neighbours on log-log axes (one-sided at the ends);
    None with a single size."""
    if len(tokens) < 2:
        return [None] * len(tokens)
    x, y = (
        np.log(np.asarray(tokens, dtype=np.float64)),
        np.log(np.asarray(values, dtype=np.float64)),
    )
    result: list[float | None] = []
    for i in range(len(x)):
        low, high = max(0, i - 1), min(len(x) - 1, i + 1)
        result.append(float((y[high] - y[low]) / (x[high] - x[low])))
    return result
