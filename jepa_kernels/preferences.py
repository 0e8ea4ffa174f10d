"""Measured cases in which `auto` passes a backend by: committed ones (preferences.json, derived
from the records under benchmarks/results) and those of this machine (`python -m jepa_kernels
calibrate`)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from . import native
from .backend import Preference, prefer_by
from .checks import dtype_name

_COMMITTED = Path(__file__).with_name("preferences.json")
Table = dict[tuple[str, str, str, str, str], Preference]


def read(path: Path) -> Table:
    """The rows of a preference file."""
    return indexed([Preference(**row) for row in json.loads(path.read_text())["preferences"]])


def indexed(rows: list[Preference]) -> Table:
    """The rows by the case in which `slower` is passed by."""
    return {(r.op, r.slower, r.device, r.dtype, r.size_class): r for r in rows}


_table: Table = read(_COMMITTED)


def found(op: str, backend: str, inputs: Any) -> Preference | None:
    """The preference that passes `backend` by for these inputs, if there is one."""
    if not _table:
        return None
    device = device_kind(inputs.device_type)
    return _table.get((op, backend, device, dtype_name(inputs.dtype), inputs.size_class()))


def device_kind(device_type: str) -> str:
    """What preferences call a device: the instruction set of a CPU, the architecture of a GPU."""
    if device_type == "cpu":
        return native.cpu_kind()
    if device_type == "cuda" and torch.cuda.is_available():
        return _architecture()
    return device_type


@functools.cache
def _architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


prefer_by(found)
