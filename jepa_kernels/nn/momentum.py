"""Schedules of the teacher's momentum: functions of the number of updates done so far. Picklable,
so that they survive in a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearMomentum:
    """``start + n (end - start) / updates``, held at `end` afterwards: the ramp of BYOL's
    successors and of the JEPA papers."""

    start: float
    end: float
    updates: int

    def __call__(self, n: int) -> float:
        return (
            self.end
            if n >= self.updates
            else self.start + n * (self.end - self.start) / self.updates
        )


@dataclass(frozen=True)
class CosineMomentum:
    """``end - (end - start) (cos(pi n / updates) + 1) / 2``, held at `end` afterwards (BYOL, Grill
    et al. 2020, section 3.2)."""

    start: float
    end: float
    updates: int

    def __call__(self, n: int) -> float:
        return (
            self.end
            - (self.end - self.start)
            * (math.cos(math.pi * min(n, self.updates) / self.updates) + 1)
            / 2
        )
