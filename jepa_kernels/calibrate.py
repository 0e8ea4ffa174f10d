"""Which backend is fastest on this machine: measures ordinary calls of every op and keeps what it
found for `auto`.

``python -m jepa_kernels calibrate`` takes about a minute. The result lies in the user's cache
folder and holds for this build, this torch and this processor; others ignore it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import preferences
from .backend import OPS, Backend, Op, Preference
from .checks import dtype_name, sentence
from .contract import Function

ROUNDS = 9
# What a backend must save before `auto` changes its mind: less is within what a busy hour moves.
LEAST_GAIN = 1.05
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One op, dtype and size class on one device, and the backends that run it."""

    op: Op
    device: str
    dtype: torch.dtype
    size_class: str
    backends: tuple[Backend, ...]

    def call(self, backend: Backend) -> Callable[[], None]:
        """Forward and backward, or the update."""
        inputs = self.op.examples[self.size_class](self.device, self.dtype)
        run = self.op.run  # type: ignore[attr-defined] # every op of OPS is a Contract
        if not isinstance(self.op, Function):

            def update() -> None:
                with torch.no_grad():
                    run(inputs, backend)

            return update
        signature = self.op.signature
        leaves = [t for t in signature.leaves(signature.values(inputs)) if t is not None]
        for leaf in leaves:
            leaf.requires_grad_()

        def forward_and_backward() -> None:
            out = run(inputs, backend)[0]
            torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

        return forward_and_backward


def cases(device: str) -> Iterator[Case]:
    """Every case that more than one backend runs on `device`."""
    for op in OPS.values():
        for dtype, size_class in itertools.product(_DTYPES, op.examples):
            inputs = op.examples[size_class](device, dtype)
            able = tuple(
                record
                for name, record in op.backends.items()
                if name != "reference" and not op.reasons(name, inputs)
            )
            if len(able) > 1:
                yield Case(op, device, dtype, size_class, able)


def measure(case: Case, budget_s: float) -> list[Preference]:
    """The first choice of `auto` against every other backend, in turn (A B B A); what is faster
    beyond its interval becomes a preference."""
    first = case.backends[0]
    found = []
    for other in case.backends[1:]:
        calls = (case.call(first), case.call(other))
        ratios = _ratios(*calls, case.device, budget_s / (len(case.backends) - 1))
        low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
        if low > 1.0 and middle >= LEAST_GAIN:
            found.append(
                Preference(
                    case.op.name,
                    preferences.device_kind(case.device),
                    dtype_name(case.dtype),
                    case.size_class,
                    first.name,
                    other.name,
                    f"measured on this machine, it takes {middle:.2f} [{low:.2f}, {high:.2f}] "
                    f"times as long as {other.name}",
                )
            )
    # One row for a case: `auto` goes to the fastest.
    return sorted(found, key=lambda row: row.why, reverse=True)[:1]


def _ratios(
    first: Callable[[], None], other: Callable[[], None], device: str, budget_s: float
) -> list[float]:
    """Times of `first` over times of `other` per round, sorted, without the extreme ones."""
    end = time.perf_counter() + budget_s
    for call in (first, other):
        call()
    once = max(_seconds(call, 1, device) for call in (first, other))
    calls = max(1, min(200, int(budget_s / (4 * ROUNDS * max(once, 1e-7)))))
    ratios: list[float] = []
    while len(ratios) < ROUNDS and (len(ratios) < 3 or time.perf_counter() < end):
        a, b, c, d = (_seconds(call, calls, device) for call in (first, other, other, first))
        ratios.append((a + d) / (b + c))
    ratios.sort()
    cut = len(ratios) // 5
    return ratios[cut : len(ratios) - cut]


def _seconds(call: Callable[[], None], calls: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(seconds: float = 60.0, devices: tuple[str, ...] | None = None) -> str:
    """Measures this machine, stores the result and says what it found.

    Raises:
        ValueError: `seconds` is not positive.
        OSError: the cache folder cannot be written.
    """
    if not seconds > 0:
        raise ValueError(sentence("calibrate", "seconds", "be positive", seconds))
    if devices is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    todo = [case for device in devices for case in cases(device)]
    measured, rows = [], []
    for case in todo:
        rows += measure(case, seconds / len(todo))
        kind = preferences.device_kind(case.device)
        measured.append([case.op.name, kind, dtype_name(case.dtype), case.size_class])
    content = {
        "holds_for": preferences.holds_for(),
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "threads": torch.get_num_threads(),
        "measured": measured,
        "preferences": [dataclasses.asdict(row) for row in rows],
    }
    store(content)
    preferences.load()
    lines = [f"{len(measured)} cases measured; auto changes its mind in {len(rows)}:"]
    lines += [
        f"  {row.op} {row.dtype} {row.size_class} on {row.device}: {row.faster} before "
        f"{row.slower} ({row.why})"
        for row in rows
    ]
    return "\n".join([*lines, f"kept in {preferences.calibration_file()}"])


def store(content: dict[str, object]) -> None:
    """Writes the calibration file as a whole or not at all."""
    path = preferences.calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
