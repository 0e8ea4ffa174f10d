"""Whether other programs had the cores while something was timed.

A sample that waited for a core is not slow, it was kept waiting: its time says nothing of the code.
Linux tells how long each thread was ready to run and did not; elsewhere the switches that a process
did not ask for stand for it.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A sample is contended when its threads together waited for a core for more than this share of its
# time, beyond a scheduling tick. A quiet machine shows a fifth of it.
WAITED_SHARE = 0.05
TICK_S = 0.001
# The same in switches that were not asked for, where waiting times are not told.
SWITCHES_PER_S, SWITCHES = 25.0, 3

_TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Usage:
    """What one sample used: wall and CPU time of this process, switches away from a core that it
    did not ask for, seconds that threads waited for one (None where unknown), and the load."""

    wall_s: float
    cpu_s: float
    switches: int
    waited_s: float | None
    load: float

    @property
    def contended(self) -> bool:
        if self.waited_s is not None:
            return self.waited_s > WAITED_SHARE * self.wall_s + TICK_S
        return self.switches > SWITCHES + SWITCHES_PER_S * self.wall_s

    def __add__(self, other: Usage) -> Usage:
        waited = None
        if self.waited_s is not None and other.waited_s is not None:
            waited = self.waited_s + other.waited_s
        return Usage(
            self.wall_s + other.wall_s,
            self.cpu_s + other.cpu_s,
            self.switches + other.switches,
            waited,
            max(self.load, other.load),
        )

    def as_dict(self) -> dict[str, Any]:
        """For a record: CPU over wall time, share of the time that threads waited, switches."""
        wall = max(self.wall_s, 1e-9)
        return {
            "cpu_over_wall": round(self.cpu_s / wall, 3),
            "waited_share": None if self.waited_s is None else round(self.waited_s / wall, 4),
            "involuntary_switches": self.switches,
            "load": round(self.load, 2),
        }


NOTHING = Usage(0.0, 0.0, 0, 0.0, 0.0)


def _waited_s() -> float | None:
    """Seconds that the threads of this process were ready to run and did not."""
    total = 0
    try:
        for task in os.scandir(_TASKS):
            total += int(Path(task.path, "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9


class Watch:
    """Begins watching when made; `stop` says what was used since."""

    def __init__(self) -> None:
        self._switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        self._waited = _waited_s()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> Usage:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        waited = _waited_s()
        known = waited is not None and self._waited is not None
        return Usage(
            wall,
            cpu,
            resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - self._switches,
            # A thread that ended takes its count with it.
            max(0.0, waited - self._waited) if known else None,  # type: ignore[operator]
            os.getloadavg()[0],
        )


def watched(call: Callable[[], Any]) -> tuple[Any, Usage]:
    """What a call returns, and what it used."""
    watch = Watch()
    value = call()
    return value, watch.stop()
