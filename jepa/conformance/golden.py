"""Golden files that know which of their arrays were read, and that can be read moved by a few units
in the last place."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# How far a moved run moves every element it reads, in units of float32's eps: what a few rounding
# errors on the way come to.
ULPS = 4


@dataclass(frozen=True)
class Run:
    """How a run of the code under test differs from the plain one.

    Attributes:
        dtype: of every floating-point array that is read.
        seed: of the moves; None moves nothing.
        sign: +1 or -1; the two runs of a seed move every element in opposite directions.
    """

    dtype: torch.dtype = torch.float32
    seed: int | None = None
    sign: int = 1

    def moved(self, value: Tensor, key: str) -> Tensor:
        """`value` in this run's dtype, every element times 1 + k * 2^-23 with k uniform in -ULPS
        .. ULPS.

        `key` tells one array's moves from another's. Integers stay as they are.
        """
        if not value.is_floating_point():
            return value
        value = value.to(self.dtype)
        if self.seed is None:
            return value
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{key}".encode()))
        steps = torch.randint(-ULPS, ULPS + 1, value.shape, generator=generator)
        return value * (1 + self.sign * torch.finfo(torch.float32).eps * steps.to(value))


class Golden:
    """One .npz file; an array that nobody reads is a failure of the check, not of the file.

    Args:
        path: the file.
        run: how `tensor` gives the inputs.
    """

    def __init__(self, path: Path, run: Run | None = None) -> None:
        self.path = path
        self.name = path.stem
        self.run = Run() if run is None else run
        with np.load(path, allow_pickle=False) as archive:
            self._arrays = {key: archive[key] for key in archive.files}
        self._unread = set(self._arrays)

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __getitem__(self, key: str) -> NDArray[Any]:
        """The array as it is in the file: what results are compared with."""
        self._unread.discard(key)
        array: NDArray[Any] = self._arrays[key]
        return array

    def tensor(self, key: str) -> Tensor:
        """The array as an input of this run: moved, and in the run's dtype if it is no integer."""
        return self.run.moved(torch.from_numpy(np.array(self[key])), f"{self.name}/{key}")

    @property
    def dtype(self) -> torch.dtype:
        return self.run.dtype

    def names(self, prefix: str = "") -> list[str]:
        return [key for key in self._arrays if key.startswith(prefix)]

    def number(self, key: str) -> float:
        return float(self[key])

    def integer(self, key: str) -> int:
        return int(self[key])

    def triple(self, key: str) -> tuple[int, int, int]:
        first, second, third = (int(v) for v in self[key])
        return first, second, third

    def unread(self) -> list[str]:
        return sorted(self._unread)

    def beside(self, name: str) -> Golden:
        """Another file of the same folder, for the same run."""
        return Golden(self.path.with_name(f"{name}.npz"), self.run)

    def widened(self) -> Self:
        """The same file with its inputs in float64; what is read there counts as read here."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.run = dataclasses.replace(self.run, dtype=torch.float64)
        return other
