"""Files that appear whole or not at all: written under another name, flushed, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What the name of a file or folder begins with while it is being written; a kill may leave one.
UNFINISHED = ".writing-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` for the body to write a file under; it takes the place of `path` when
    the body is done, and is removed when the body raises."""
    scratch = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        yield scratch
        flush(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by a value as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
