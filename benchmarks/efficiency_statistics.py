"""Statistics of the sample-efficiency study: bootstrap over seeds and clips of paired differences,
the clips one curve needs to reach another's accuracy, and the difference that could have been seen.

Every variant of a seed starts from the same weights and is asked the same test clips, so a draw of
the bootstrap takes the same seeds and the same clips for both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Float = NDArray[np.float64]
DRAWS = 2000


def unpacked(hits: str, clips: int) -> Float:
    """[clips], 1 where a recorded answer is right."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(hits), dtype=np.uint8))
    return bits[:clips].astype(np.float64)


def group_share(hits: Mapping[str, str], names: Sequence[str], clips: int) -> Float:
    """[clips], the share of a group's questions that are answered right."""
    return np.mean([unpacked(hits[name], clips) for name in names], axis=0)


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference of accuracies; `spread` is the standard deviation over seeds (NaN with
    one seed), `strict` whether an interval that allows for all comparisons still leaves out 0."""

    seeds: int
    spread: float
    strict: bool


def _draws(seeds: int, clips: int, generator: np.random.Generator) -> tuple[NDArray, NDArray]:
    return generator.integers(seeds, size=seeds), generator.integers(clips, size=clips)


def mean_interval(values: Float, draws: int = DRAWS) -> Interval:
    """The mean of [seeds, clips] with its 95 % interval over both."""
    generator = np.random.default_rng(0)
    means = []
    for _ in range(draws):
        rows, columns = _draws(*values.shape, generator)
        means.append(values[rows][:, columns].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def difference(one: Float, other: Float, comparisons: int = 1, draws: int = DRAWS) -> Difference:
    """Mean of `one` - `other`, both [seeds, clips], paired by seed and by clip. With `comparisons`
    a second interval at level 1 - 0.05 / comparisons decides `strict` (Bonferroni)."""
    if one.shape != other.shape:
        raise ValueError(
            f"difference: other must have the shape of one {one.shape}, got {other.shape}."
        )
    apart = one - other
    generator = np.random.default_rng(0)
    means = []
    for _ in range(draws):
        rows, columns = _draws(*apart.shape, generator)
        means.append(apart[rows][:, columns].mean())
    tail = 0.025 / comparisons
    low, high = np.quantile(means, (0.025, 0.975))
    lowest, highest = np.quantile(means, (tail, 1 - tail))
    per_seed = apart.mean(1)
    spread = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else float("nan")
    strict = bool(lowest > 0 or highest < 0)
    return Difference(float(apart.mean()), float(low), float(high), len(per_seed), spread, strict)


def clips_to_reach(clips: Float, accuracy: Float, level: float) -> float:
    """Clips at which a curve first reaches a level: linear in log(1 + clips) between its points;
    NaN where it never does, 0 where it starts there."""
    if accuracy[0] >= level:
        return 0.0
    place = np.log1p(clips)
    for i in range(1, len(clips)):
        if accuracy[i] >= level:
            share = (level - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return float(np.expm1(place[i - 1] + share * (place[i] - place[i - 1])))
    return float("nan")


@dataclass(frozen=True)
class Gain:
    """How many times the clips the baseline needs for an accuracy that both reach. `defined` is the
    share of draws in which both curves rise from their start to such a level; no ratio is given
    (NaN) where that is less than half of them."""

    ratio: Interval
    defined: float


def gain(clips: Float, baseline: Float, variant: Float, draws: int = 500) -> Gain:
    """Ratio of clips, baseline / variant, at the lower of the two final accuracies; above 1 the
    variant needs fewer.

    Args:
        clips: [points] clips seen, the first 0.
        baseline, variant: [points, seeds, clips] right answers.
    """
    generator = np.random.default_rng(0)

    def ratio(one: Float, other: Float) -> float:
        level = min(one[-1], other[-1])
        needed = clips_to_reach(clips, one, level), clips_to_reach(clips, other, level)
        # A level at or below the start says nothing of learning.
        if min(needed) <= 0.0 or not np.isfinite(needed).all():
            return float("nan")
        return needed[0] / needed[1]

    found = []
    for _ in range(draws):
        rows, columns = _draws(*baseline.shape[1:], generator)
        pick = (slice(None), rows[:, None], columns[None])
        found.append(ratio(baseline[pick].mean((1, 2)), variant[pick].mean((1, 2))))
    values = np.array(found)
    defined = float(np.isfinite(values).mean())
    if defined < 0.5:
        return Gain(Interval(float("nan"), float("nan"), float("nan")), defined)
    middle = ratio(baseline.mean((1, 2)), variant.mean((1, 2)))
    low, high = np.nanquantile(values, (0.025, 0.975))
    return Gain(Interval(middle, float(low), float(high)), defined)


def smallest_seen(spread: float, seeds: int, power: float = 0.8) -> float:
    """The difference that a paired t-test at 5 % sees with this power, given the standard deviation
    over seeds of the difference; NaN with one seed."""
    if seeds < 2:
        return float("nan")
    quantiles = stats.t.ppf((0.975, power), seeds - 1)
    return float(quantiles.sum() * spread / np.sqrt(seeds))
