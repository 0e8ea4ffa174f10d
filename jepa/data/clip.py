"""What every data set offers the loader: one clip at a time, as the bytes of its frames."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jepa.config import ConfigError

_log = logging.getLogger(__name__)


class MissingDataError(FileNotFoundError):
    """A data set is not where it was said to be; the message is one sentence with what is expected
    where."""


class BadClipError(RuntimeError):
    """One file cannot be decoded. The loader counts it, names it and takes another sample."""


@dataclass(frozen=True)
class ClipSpec:
    """How to cut a clip out of a video: `frames` frames, `stride` frames apart or at `fps`, scaled
    to (height, width).

    The scaling ignores the aspect ratio: crops are boxes in shares of the frame, so they undo it
    (see transforms.py).
    """

    frames: int = 16
    stride: int = 2
    fps: float | None = None
    height: int = 256
    width: int = 256

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"ClipSpec: {name} must be at least 1, got {getattr(self, name)}.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"ClipSpec: fps must be positive, got {self.fps}.")


@dataclass(frozen=True)
class Clip:
    """Frames [T, H, W, 3] uint8 and the size of the picture they were scaled from: upright, in
    square pixels. Alpha is ignored: transparent pixels keep their colour."""

    frames: NDArray[np.uint8]
    source_height: int
    source_width: int


class ClipDataset(Protocol):
    """A list of labelled clips. `still` says that a clip is one image (T = 1)."""

    name: str
    num_classes: int
    still: bool

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """Class of a sample, -1 where the list has none."""
        ...

    def may_flip(self, index: int) -> bool:
        """Whether a mirrored sample keeps its label."""
        ...

    def where(self, index: int) -> str:
        """Path (or other name) of a sample, for logs."""
        ...

    def read(self, index: int, spec: ClipSpec, draw: float) -> Clip:
        """The clip that a number in [0, 1) picks out of a sample; BadClipError when it cannot be
        decoded."""
        ...


class Part:
    """Some samples of a data set, in the order given."""

    def __init__(self, whole: ClipDataset, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, list(indices)
        self.name, self.num_classes, self.still = whole.name, whole.num_classes, whole.still

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, index: int) -> int:
        return self.whole.label(self.indices[index])

    def may_flip(self, index: int) -> bool:
        return self.whole.may_flip(self.indices[index])

    def where(self, index: int) -> str:
        return self.whole.where(self.indices[index])

    def read(self, index: int, spec: ClipSpec, draw: float) -> Clip:
        return self.whole.read(self.indices[index], spec, draw)


def labelled(dataset: ClipDataset, classes: int | None = None) -> ClipDataset:
    """The samples that have a label: training and scoring on labels leave out the others, and say
    how many.

    Args:
        dataset: any.
        classes: of the training data, where `dataset` is what it is tested on.

    Raises:
        ConfigError: none has a label, or one has a label that the training data lacks.
    """
    labels = [dataset.label(index) for index in range(len(dataset))]
    kept = [index for index, label in enumerate(labels) if label >= 0]
    if not kept:
        raise ConfigError(f"config: data must have labels, got none in {dataset.name}.")
    if classes is not None and max(labels) >= classes:
        beyond = next(index for index, label in enumerate(labels) if label >= classes)
        raise ConfigError(
            f"config: test labels must be below {classes}, the number of training classes, got "
            f"{labels[beyond]} of {dataset.where(beyond)}."
        )
    if len(kept) == len(labels):
        return dataset
    missing = next(index for index, label in enumerate(labels) if label < 0)
    _log.warning(
        "left out %d of %d clips of %s that have no label, among them %s",
        len(labels) - len(kept),
        len(labels),
        dataset.name,
        dataset.where(missing),
    )
    return Part(dataset, kept)
