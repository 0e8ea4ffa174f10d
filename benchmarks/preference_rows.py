"""Which backend `auto` should pass by, from plain rows of seconds.

A row is {op, backend, device, dtype, size_class, case, forward_s, forward_backward_s, record}: the
median seconds of one backend on one case, None where a pass was not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jepa_kernels.backend import OPS

Row = dict[str, Any]
# A backend is passed by where another takes less than this share of its time: closer than that is
# within what two runs differ by.
MARGIN = 0.97


def derive(rows: Sequence[Row], priority: Mapping[str, Sequence[str]] | None = None) -> list[Row]:
    """Rows {op, backend, device, dtype, size_class, faster, ratio, record}: `backend` comes first
    in the op's order, but `faster` takes `ratio` (below 1) of its time.

    Times of several cases of one size class are compared case by case, and the geometric mean of
    the ratios decides; forward and backward together where both sides have it.

    Args:
        rows: as the module says; of any number of devices.
        priority: order of backends of each op; None is that of the package.
    """
    order = {name: op.priority for name, op in OPS.items()} if priority is None else priority
    groups: dict[tuple[str, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "device", "dtype", "size_class"))
        groups.setdefault(key, {}).setdefault(row["backend"], {})[row["case"]] = row
    found = []
    for (op, device, dtype, size_class), backends in groups.items():
        ranked = [name for name in order[op] if name in backends]
        for place, name in enumerate(ranked):
            better = [
                (ratio, other)
                for other in ranked[place + 1 :]
                if (ratio := _ratio(backends[other], backends[name])) is not None and ratio < MARGIN
            ]
            if better:
                ratio, faster = min(better)
                found.append(
                    {
                        "op": op,
                        "backend": name,
                        "device": device,
                        "dtype": dtype,
                        "size_class": size_class,
                        "faster": faster,
                        "ratio": round(ratio, 4),
                        "record": next(iter(backends[name].values()))["record"],
                    }
                )
    return found


def _ratio(numerator: Mapping[str, Row], denominator: Mapping[str, Row]) -> float | None:
    """Geometric mean over the cases that both have; None where they share none."""
    ratios = []
    for case in numerator.keys() & denominator.keys():
        for name in ("forward_backward_s", "forward_s"):
            above, below = numerator[case][name], denominator[case][name]
            if above is not None and below is not None:
                ratios.append(above / below)
                break
    return statistics.geometric_mean(ratios) if ratios else None
