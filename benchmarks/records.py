"""Reads the committed records: devices newest first, and of every comparison the latest record."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jepa_kernels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_COMPARISON = ("backend", "baseline", "case", "dtype", "pass")
_ISA = {
    "portable": "x86-64",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_bf16": "AVX-512 with BF16",
}
Record = dict[str, Any]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Device:
    """One folder of records.

    Attributes:
        key: the folder's name.
        title: the machine in words.
        short: the same in a column's head.
        tables: op -> the latest record of every comparison, in the order of first appearance.
        newest: when the last of them was taken.
        clock: threads and clock of most of them.
        is_gpu: whether the ops ran on a GPU.
    """

    key: str
    title: str
    short: str
    tables: dict[str, list[Record]]
    newest: str
    clock: str
    is_gpu: bool

    def otherwise(self, record: Record) -> str:
        """In brackets how a row was measured, where most were measured in another way."""
        how = clock(record)
        return "" if how == self.clock else f" ({how})"

    def cell(self, record: Record | None) -> str:
        """The ratio of a record for a table of this device; empty where there is none."""
        return "" if record is None else ratio(record) + self.otherwise(record)

    def path(self, op: str) -> str:
        """The record's file, from the root of the repository."""
        return f"benchmarks/results/{self.key}/{op}.json"


def newest(records: list[Record]) -> list[Record]:
    """The latest record of every comparison, in the order of their first appearance."""
    latest: dict[tuple[str, ...], Record] = {}
    for record in records:
        latest[tuple(record[k] for k in _COMPARISON)] = record
    return list(latest.values())


def devices() -> list[Device]:
    """Every device with records of ops, the one measured last first."""
    found = [_device(folder) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()]
    return sorted((d for d in found if d.tables), key=lambda d: d.newest, reverse=True)


def _device(folder: Path) -> Device:
    tables = {}
    for path in sorted(folder.glob("*.json")):
        content = read(path)
        records = content.get("records") if isinstance(content, dict) else None
        if records and all("baseline" in record for record in records):
            tables[path.stem] = newest(records)
    rows = [record for table in tables.values() for record in table]
    if not rows:
        return Device(folder.name, folder.name, folder.name, {}, "", "", False)
    last = max(rows, key=lambda record: record["time"])
    is_gpu = not folder.name.startswith("cpu-")
    isa = _ISA.get(last["cpu_isa"], last["cpu_isa"])
    title = last["device"] if is_gpu else f"{last['device']}, {last['cores']} cores, {isa}"
    (usual, _), *_ = Counter(map(clock, rows)).most_common(1)
    short = last["device"] if is_gpu else isa
    return Device(folder.name, title, short, tables, last["time"], usual, is_gpu)


def operations() -> list[str]:
    """Every op that some device has records of."""
    return sorted({op for device in devices() for op in device.tables})


def chosen(records: list[Record]) -> dict[tuple[str, str, str, str], Record]:
    """One record of every (case, dtype, pass, baseline): that of the backend which `auto` tries
    first."""
    rank = {name: place for place, name in enumerate(jepa_kernels.BACKENDS)}
    best: dict[tuple[str, str, str, str], Record] = {}
    for record in sorted(records, key=lambda r: rank.get(r["backend"], -1)):
        best[record["case"], record["dtype"], record["pass"], record["baseline"]] = record
    return best


def verdict(record: Record) -> str:
    """``loss``, ``even`` or nothing, by the interval."""
    low, high = record["interval"]
    return "" if low >= 1 else "loss" if high < 1 else "even"


def ratio(record: Record) -> str:
    """The paired ratio with its interval; below 1 is a loss and says so."""
    if record["status"] != "ok":
        return str(record["status"])
    low, high = record["interval"]
    mark = verdict(record)
    return f"{record['ratio']:.2f} [{low:.2f}, {high:.2f}]" + (f" ({mark})" if mark else "")


def clock(record: Record) -> str:
    """Threads and clock of a measurement: that of CPU time counts no waiting."""
    threads = record["threads"]
    return f"{threads} thread{'s' * (threads > 1)}, {record.get('clock', 'wall')} time"
