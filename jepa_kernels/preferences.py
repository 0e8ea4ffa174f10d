"""Measured cases in which `auto` passes a backend by: committed ones (preferences.json, derived
from the records under benchmarks/results) and those of this machine (`python -m jepa_kernels
calibrate`), which come first."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import capability, native
from .backend import Preference, prefer_by
from .checks import dtype_name

_COMMITTED = Path(__file__).with_name("preferences.json")
Table = dict[tuple[str, str, str], dict[tuple[str, str], Preference]]
_table: Table = {}


def indexed(rows: Iterable[Preference]) -> Table:
    """The rows by the case in which `slower` is passed by."""
    table: Table = {}
    for row in rows:
        table.setdefault((row.op, row.slower, row.device), {})[row.dtype, row.size_class] = row
    return table


def committed() -> list[Preference]:
    """What came with the package."""
    rows = json.loads(_COMMITTED.read_text())["preferences"]
    return [Preference(**row) for row in rows]


def calibration_file() -> Path:
    """Where `calibrate` keeps what it measured: in JEPA_KERNELS_CACHE, or else in the folder
    jepa_kernels of XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("JEPA_KERNELS_CACHE")
    if own:
        return Path(own) / "calibration.json"
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(folder) / "jepa_kernels" / "calibration.json"


def holds_for() -> dict[str, str]:
    """What a calibration is bound to: another build, torch or processor measures anew."""
    library = native.library_stamp()
    processor = f"{platform.machine()} {native.cpu_kind()} {os.cpu_count()}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"library": library, "torch": torch.__version__, "processor": processor, "gpu": gpu}


def calibration() -> dict[str, Any] | None:
    """The stored calibration, or None where there is none that holds for this machine and build.

    A file that cannot be read or is of another form counts as none: it is a cache.
    """
    try:
        content = json.loads(calibration_file().read_text())
        rows = [Preference(**row) for row in content["preferences"]]
        measured = {tuple(case) for case in content["measured"]}
        holds = content["holds_for"] == holds_for()
        when = str(content["when"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {"rows": rows, "measured": measured, "when": when} if holds else None


def load() -> None:
    """Reads both sources again. A calibrated case leaves no room for a committed one."""
    global _table
    rows = committed()
    own = calibration()
    if own is not None:
        rows = [r for r in rows if (r.op, r.device, r.dtype, r.size_class) not in own["measured"]]
        rows += own["rows"]
    _table = indexed(rows)


def summary() -> str:
    """One line for `doctor`."""
    own = calibration()
    here = (
        "not calibrated (python -m jepa_kernels calibrate)"
        if own is None
        else f"{len(own['rows'])} of {len(own['measured'])} cases calibrated {own['when']} "
        f"({calibration_file()})"
    )
    return f"{len(committed())} committed; this machine: {here}"


def found(op: str, backend: str, inputs: Any) -> Preference | None:
    """The preference that passes `backend` by for these inputs, if there is one."""
    # Nothing is asked of the inputs where no row can concern them: this runs at every call.
    if not _table:
        return None
    rows = _table.get((op, backend, device_kind(inputs.device_type)))
    return None if rows is None else rows.get((dtype_name(inputs.dtype), inputs.size_class()))


def device_kind(device_type: str) -> str:
    """What preferences call a device: the instruction set of a CPU, the architecture of a GPU."""
    if device_type == "cpu":
        return native.cpu_kind()
    if device_type == "cuda":
        return "sm_{}{}".format(*capability.first_device())
    return device_type


load()
prefer_by(found)
