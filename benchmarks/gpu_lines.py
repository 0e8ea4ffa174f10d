"""Files of records, one line of JSON each: a line is written whole or, by a kill, as a last
fragment that readers leave out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Adds one line with one write; several processes may add to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A newline first ends the fragment that a killed process may have left.
    line = ("\n" + json.dumps(row, sort_keys=True) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if os.write(handle, line) != len(line):
            raise OSError(f"records: {path} must have room for a line of {len(line)} bytes.")
    finally:
        os.close(handle)


def read(path: Path) -> list[Row]:
    """Every whole line; nothing where there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a fragment: its row was not recorded
    return rows


def device_is_lost(row: Row) -> bool:
    """Whether a row tells of a CUDA error, after which every call of the process fails: what it
    would record next says nothing of what it names."""
    return row["status"] == "failed" and "CUDA error" in row["reason"]
