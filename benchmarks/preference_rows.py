"""Which backend `auto` should pass by: from plain rows of seconds to jepa_kernels/preferences.json.

    python -m benchmarks.preference_rows            writes the file from the committed records
    python -m benchmarks.preference_rows --check    exits with 1 where it is not current

A row is {op, backend, device, dtype, size_class, case, forward_s, forward_backward_s, record}: the
median seconds of one backend on one case, None where a pass was not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from jepa import atomic
from jepa_kernels import preferences
from jepa_kernels.backend import OPS
from jepa_kernels.ops.ema.lists import class_of
from jepa_kernels.testing.rollout import OP_NAMES

Row = dict[str, Any]
TABLE = Path(preferences.__file__).with_name("preferences.json")
# Held until a record says otherwise: what was read in compiled code, or measured without a record.
UNRECORDED: tuple[Row, ...] = (
    *(
        {
            "op": "masked_attention",
            "device": "sm_90",
            "dtype": dtype,
            "size_class": size_class,
            "slower": "cuda",
            "faster": "triton",
            "why": "triton uses this GPU's own matrix instructions, cuda those of the generation "
            "before (by reading, no record yet)",
        }
        for dtype in ("bfloat16", "float16")
        for size_class in ("tiny", "short", "long")
    ),
    *(
        {
            "op": "masked_attention",
            "device": device,
            "dtype": dtype,
            "size_class": size_class,
            "slower": slower,
            "faster": "flash",
            "why": "FlashAttention 3 and 4 are written for this GPU's generation and used by many "
            "(by reading, no record yet)",
            "library": "FlashAttention",
        }
        # On Hopper triton is before cuda already; consumer Blackwell has no instructions of its
        # own that FlashAttention 4 uses.
        for device, others in (
            ("sm_90", ("triton",)),
            *((data_centre, ("cuda", "triton")) for data_centre in ("sm_100", "sm_103", "sm_110")),
        )
        for slower in others
        for dtype in ("bfloat16", "float16")
        for size_class in ("tiny", "short", "long")
    ),
    *(
        {
            "op": "masked_attention",
            "device": "amx",
            "dtype": "bfloat16",
            "size_class": size_class,
            "slower": "cpu",
            "faster": "torch",
            "why": "takes 1.4 to 3 times as long as torch, whose products use the processor's "
            "tiles (measured on such a processor, no record yet)",
        }
        for size_class in ("tiny", "short", "long")
    ),
)

# A backend is passed by where another takes less than this share of its time: closer than that is
# within what two runs differ by.
MARGIN = 0.97


def derive(rows: Sequence[Row], priority: Mapping[str, Sequence[str]] | None = None) -> list[Row]:
    """Preferences {op, device, dtype, size_class, slower, faster, why}: `slower` comes first in the
    op's order, but takes longer than `faster`.

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
                record = next(iter(backends[name].values()))["record"]
                why = f"takes {1 / ratio:.2f} times as long ({record})"
                found.append(
                    {
                        "op": op,
                        "device": device,
                        "dtype": dtype,
                        "size_class": size_class,
                        "slower": name,
                        "faster": faster,
                        "why": why,
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


def recorded(results: Path = machine.RESULTS) -> list[Row]:
    """Plain rows of every committed record: those of GPU runs as they are, those of op benchmarks
    where more than one of our backends took the same case."""
    rows: list[Row] = []
    for path in sorted(results.glob("*/rows.json")):
        rows += json.loads(path.read_text())["rows"]
    for name in (
        "masked_attention",
        "ema_update",
        "adamw_ema",
        "latent_rollout",
        "sliced_gaussianity",
        "visible_patch_embed",
    ):
        for path in sorted(results.glob(f"*/{name}.json")):
            rows += _of_benchmark(path, f"benchmarks/results/{path.parent.name}/{path.name}")
    return rows


def op_of(record: Row) -> str:
    """The op whose backends a row of a benchmark compares: rollouts have one for each cell."""
    cell = record.get("details", {}).get("cell")
    return str(record["op"]) if cell is None else OP_NAMES[cell]


def _of_benchmark(path: Path, source: str) -> list[Row]:
    found: dict[tuple[str, ...], Row] = {}
    for record in json.loads(path.read_text())["records"]:
        size_class = _size_class(record)
        if record["status"] != "ok" or size_class is None:
            continue
        key = tuple(record[name] for name in ("backend", "case", "dtype"))
        plain = found.setdefault(
            key,
            {
                "op": op_of(record),
                "backend": record["backend"],
                "device": record.get("device_kind", record["cpu_isa"]),
                "dtype": record["dtype"],
                "size_class": size_class,
                "case": record["case"],
                "forward_s": None,
                "forward_backward_s": None,
                "record": source,
            },
        )
        both = record["pass"] == "forward+backward"
        plain["forward_backward_s" if both else "forward_s"] = (
            record["candidate"]["median_ms"] / 1e3
        )
    return list(found.values())


def _size_class(record: Row) -> str | None:
    """The class of the op's inputs; None where the record does not tell."""
    details = record["details"]
    if "size_class" in details:
        return str(details["size_class"])
    return class_of(details["parameters"]) if "parameters" in details else None


def table(results: Path = machine.RESULTS) -> str:
    """The text of preferences.json: what records show, then what none decides yet."""
    rows = recorded(results)
    decided = {(r["op"], r["device"], r["dtype"], r["size_class"]) for r in rows}
    kept = [
        r for r in UNRECORDED if (r["op"], r["device"], r["dtype"], r["size_class"]) not in decided
    ]
    lines = ",\n".join(json.dumps(row) for row in [*derive(rows), *kept])
    return f'{{"preferences": [\n{lines}\n]}}\n'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preference_rows",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    text = table()
    if arguments.check:
        return int(TABLE.read_text() != text)
    atomic.write_text(TABLE, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
