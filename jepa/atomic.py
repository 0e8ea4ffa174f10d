"""Files that appear whole or not at all: written under another name, flushed, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# What the name of a file or folder begins with while it is being written; a kill may leave one.
UNFINISHED = ".writing-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` for the body to write a file under; it takes the place of `path` when
    the body is done, and is removed when the body raises.

    Raises:
        OSError: in one sentence that names `path`, such as for a full disk.
    """
    scratch = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        with named_failure(path):
            yield scratch
            flush(scratch)
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """An OSError of the body, as one sentence that says what could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno, f"{path} could not be written: {os.strerror(error.errno)}"
        ) from error


def sweep(folder: Path) -> None:
    """Removes what a killed process left unfinished in `folder`, which must be this process's
    own."""
    for entry in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file; a full disk is an OSError, as it is for any other file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


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
