"""What every data set offers the loader: one clip at a time, as the bytes of its frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


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
