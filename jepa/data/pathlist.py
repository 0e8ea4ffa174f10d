"""A plain list of "path label" lines, as other JEPA code uses."""

from __future__ import annotations

import re
from pathlib import Path

from jepa.data.files import IMAGES, VIDEOS, FileClips, Line, existing, text_lines, whole_number

_LABELLED = re.compile(r"(?P<path>.+?)[ \t]*[ \t,;][ \t]*(?P<label>[^ \t,;]+)")
_QUOTED = re.compile(r'"(?P<path>[^"]+)"(?:[ \t]*[ \t,;][ \t]*(?P<label>[^ \t,;]+))?')
_HEADERS = ("label", "labels", "class", "target")


def pathlist(
    list_file: str | Path,
    root: str | Path | None = None,
    num_classes: int | None = None,
    *,
    still: bool = False,
) -> FileClips:
    """Videos (or images) by a list.

    Args:
        list_file: a line per file: a path, which may hold blanks, or one in double quotes; then
            a blank, tab, comma or semicolon and a whole number from 0 on. Without a number (or with
            -1) the clip has no label. A first line that ends in "label" is a header.
        root: folder of relative paths; None means the folder of the list.
        num_classes: None means one more than the largest label (at least 1).
        still: the files are images.

    Raises:
        MissingDataError: the list or the folder is not there.
        ConfigError: the list cannot be read; the sentence names file and line.
    """
    listing = existing(list_file, "pathlist", 'the list of "path label" lines')
    folder = (
        existing(root, "pathlist", "the folder of the listed files")
        if root is not None
        else listing.parent
    )
    lines = text_lines(listing, "pathlist")
    if lines and re.split(r"[ \t,;]+", lines[0].text.lower())[-1] in _HEADERS:
        lines = lines[1:]
    pairs = [_entry(line) for line in lines]
    files, labels = [path for path, _ in pairs], [label for _, label in pairs]
    return FileClips(
        listing.stem,
        folder,
        files,
        labels,
        num_classes if num_classes is not None else max([0, *labels]) + 1,
        still=still,
    )


def _entry(line: Line) -> tuple[str, int]:
    """Path and label of a line, the label -1 where there is none."""
    quoted = _QUOTED.fullmatch(line.text)
    found = quoted or _LABELLED.fullmatch(line.text)
    if found is None or found["label"] is None:
        return (line.text if found is None else found["path"]), -1
    path, label = found["path"], found["label"]
    number = whole_number(label)
    if number is not None:
        return path, number
    suffixes = (*VIDEOS, *IMAGES)
    meant = quoted or (path.lower().endswith(suffixes) and not label.lower().endswith(suffixes))
    if meant or _is_number(label):
        raise line.refused("pathlist", "give labels as whole numbers from 0 on")
    return line.text, -1


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
