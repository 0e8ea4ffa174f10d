"""A data set that is a list of files with labels; the named ones differ only in how they find the
list."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from jepa.data.clip import Clip, ClipSpec, MissingDataError
from jepa.data.decode import read_image, read_video


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
            raise ValueError(f"{name}: files must not be empty, got a list without entries.")
        if max(labels) >= num_classes:
            raise ValueError(f"{name}: labels must be below {num_classes}, got {max(labels)}.")
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


def text_lines(path: Path) -> list[str]:
    """Lines without their ends (LF or CRLF) and without blank ones."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
