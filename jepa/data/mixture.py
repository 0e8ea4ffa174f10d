"""Which samples a step reads: epochs of one data set, weighted mixtures, or a list in order. Each
is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jepa.counter_rng import Stream, permutation, stream_id, uniforms
from jepa.data.clip import ClipDataset


@dataclass(frozen=True)
class Pick:
    """One sample: its data set, its index there, and its number among all samples of all data
    sets."""

    dataset: ClipDataset
    index: int
    sample_id: int


class Picker(Protocol):
    """Chooses the samples of a step. `slots` are places in the global batch; one call sees one
    rank's."""

    datasets: Sequence[ClipDataset]
    repeat_stills: bool  # stills become clips of equal frames (as in the published code)

    def pick(
        self, seed: int, step: int, slots: NDArray[np.int64], global_batch: int
    ) -> list[Pick]: ...


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return permutation(seed, epoch, size)


class Epochs:
    """Every sample once per epoch, in a new random order each time; an epoch may end inside a
    batch."""

    def __init__(self, dataset: ClipDataset, *, repeat_stills: bool = False) -> None:
        self.datasets: Sequence[ClipDataset] = (dataset,)
        self.repeat_stills = repeat_stills

    def pick(self, seed: int, step: int, slots: NDArray[np.int64], global_batch: int) -> list[Pick]:
        dataset = self.datasets[0]
        picks = []
        for slot in slots:
            epoch, place = divmod(step * global_batch + int(slot), len(dataset))
            index = int(_order(seed, epoch, len(dataset))[place])
            picks.append(Pick(dataset, index, index))
        return picks


class InOrder:
    """Every sample once, in the order of the list; the last step may be short and later ones are
    empty. For evaluation."""

    repeat_stills = False

    def __init__(self, dataset: ClipDataset) -> None:
        self.datasets: Sequence[ClipDataset] = (dataset,)

    def steps(self, global_batch: int) -> int:
        """Steps that cover the list."""
        return -(-len(self.datasets[0]) // global_batch)

    def pick(self, seed: int, step: int, slots: NDArray[np.int64], global_batch: int) -> list[Pick]:
        dataset = self.datasets[0]
        indices = [step * global_batch + int(slot) for slot in slots]
        return [Pick(dataset, index, index) for index in indices if index < len(dataset)]


class Mixture:
    """Samples drawn with replacement: a data set by weight, then one of its samples uniformly.

    Clips of one batch have one length, so a step reads either videos or stills (T = 1), drawn for
    the whole global batch by the weight of each kind; over many steps every data set gets its
    share. With `repeat_stills` (as in the published code) stills are repeated to the length of
    the videos and mix with them freely; temporal objectives then run on stills.
    """

    def __init__(
        self,
        datasets: Sequence[ClipDataset],
        weights: Sequence[float],
        *,
        repeat_stills: bool = False,
    ) -> None:
        if not datasets or len(datasets) != len(weights):
            raise ValueError(
                f"Mixture: weights must be one per data set (at least one), got {len(weights)} "
                f"for {len(datasets)}."
            )
        if min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(
                "Mixture: weights must not be negative and have a positive sum, got "
                f"{list(weights)}."
            )
        self.datasets: Sequence[ClipDataset] = tuple(datasets)
        self.repeat_stills = repeat_stills
        self._weights = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._offsets = np.concatenate([[0], np.cumsum([len(d) for d in datasets])])
        self._still = np.array([d.still for d in datasets])

    def pick(self, seed: int, step: int, slots: NDArray[np.int64], global_batch: int) -> list[Pick]:
        weights = self._weights
        if not self.repeat_stills and self._still.any():
            draw = uniforms(seed, step, np.int64(0), stream_id(Stream.MODALITY), 1).item()
            still_step = draw < weights[self._still].sum()
            weights = np.where(self._still == still_step, weights, 0.0)
        cumulative = np.cumsum(weights)
        numbers = uniforms(seed, step, slots, stream_id(Stream.SOURCE), 2)
        chosen = np.searchsorted(cumulative, numbers[:, 0] * cumulative[-1], side="right")
        picks = []
        for source, number in zip(chosen, numbers[:, 1], strict=True):
            dataset = self.datasets[source]
            index = int(number * len(dataset))
            picks.append(Pick(dataset, index, int(self._offsets[source]) + index))
        return picks


MIXED_WEIGHTS = {"ucf101": 0.2, "ssv2": 0.6, "imagenet100": 0.2}


def mixed_regime(
    ucf101: ClipDataset, ssv2: ClipDataset, imagenet100: ClipDataset, *, repeat_stills: bool = False
) -> Mixture:
    """The mixed regime of the study: UCF-101 .2, Something-Something V2 .6, ImageNet-100 .2."""
    return Mixture(
        (ucf101, ssv2, imagenet100), tuple(MIXED_WEIGHTS.values()), repeat_stills=repeat_stills
    )
