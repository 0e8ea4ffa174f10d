"""A data set that is a list of files with labels; the named ones differ only in how they find the
list."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa.config import ConfigError
from jepa.data.clip import Clip, ClipSpec, MissingDataError
from jepa.data.decode import read_image, read_video

VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".gif", ".3gp", ".ogv"),
    *(".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts"),
)
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# A label beyond this is a number of something else.
MAX_LABEL = 999_999


class FileClips:
    """Files and their classes.

    Args:
        name: for logs.
        root: folder of the files.
        files: paths relative to `root` (or absolute).
        labels: class of each file, -1 where unknown.
        num_classes: of the data set, not of the list.
        still: the files are images.
        no_flip: classes that mirroring would turn into others.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        labels: Sequence[int],
        num_classes: int,
        *,
        still: bool = False,
        no_flip: Collection[int] = (),
    ) -> None:
        if len(files) != len(labels):
            raise ValueError(
                f"{name}: labels must be as many as files, got {len(labels)} and {len(files)}."
            )
        if not files:
            raise ConfigError(f"{name}: files must not be empty, got a list without entries.")
        if max(labels) >= num_classes:
            raise ConfigError(f"{name}: labels must be below {num_classes}, got {max(labels)}.")
        if min(labels) < -1:
            raise ConfigError(
                f"{name}: labels must be at least 0 (-1 for none), got {min(labels)}."
            )
        self.name, self.root, self.num_classes, self.still = name, root, num_classes, still
        self.files, self.labels, self._no_flip = list(files), list(labels), frozenset(no_flip)

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> int:
        return self.labels[index]

    def may_flip(self, index: int) -> bool:
        return self.labels[index] not in self._no_flip

    def where(self, index: int) -> str:
        return str(self.root / self.files[index])

    def read(self, index: int, spec: ClipSpec, draw: float) -> Clip:
        path = self.root / self.files[index]
        return read_image(path, spec) if self.still else read_video(path, spec, draw)


def existing(path: str | Path, name: str, content: str) -> Path:
    """The path, or MissingDataError in one sentence."""
    found = Path(path)
    if not found.exists():
        raise MissingDataError(f"{name}: {content} must be at {found}, got nothing there.")
    return found


@dataclass(frozen=True)
class Line:
    """A line of a list, and where it is."""

    text: str
    number: int
    path: Path

    def refused(self, name: str, requirement: str) -> ConfigError:
        """The error of a line that does not do what `requirement` says."""
        return ConfigError(
            f"{name}: {self.path} must {requirement}, got {self.text!r} in line {self.number}."
        )


def text_lines(path: Path, name: str) -> list[Line]:
    """Lines without their ends (LF, CRLF or CR), blanks around them, and blank ones.

    The text is UTF-8, or UTF-16 where a byte order mark says so; bytes that are not UTF-8 stand for
    themselves, as in file names.

    Raises:
        ConfigError: the file is not text.
    """
    content = _content(path, name)
    lines = re.split(r"\r\n|\n|\r", content)
    stripped = [Line(text.strip(" \t"), number, path) for number, text in enumerate(lines, 1)]
    return [line for line in stripped if line.text]


def read_json(path: Path, name: str) -> Any:
    """What a JSON file holds, or ConfigError."""
    try:
        return json.loads(_content(path, name))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: {path} must be JSON, got {error}.") from error


def whole_number(text: str) -> int | None:
    """The label that a text gives, None where it gives none. -1 stands for no label."""
    if text == "-1":
        return -1
    found = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_LABEL))
    return int(text) if found else None


def _content(path: Path, name: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{name}: {path} must be a file to read, got {error.strerror}."
        ) from error
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = content.decode("utf-16", errors="replace")
    else:
        text = content.decode("utf-8-sig", errors="surrogateescape")
    if "\0" in text:
        raise ConfigError(f"{name}: {path} must be text, got a file of bytes.")
    return text
