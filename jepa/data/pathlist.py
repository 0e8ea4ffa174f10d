"""A plain list of "path label" lines, as other JEPA code uses."""

from __future__ import annotations

from pathlib import Path

from jepa.data.files import FileClips, existing, text_lines


def pathlist(
    list_file: str | Path,
    root: str | Path | None = None,
    num_classes: int | None = None,
    *,
    still: bool = False,
) -> FileClips:
    """Videos (or images) by a list.

    Args:
        list_file: a line per file: a path, which may hold blanks, then a blank and a whole number;
            without a number the label is -1.
        root: folder of relative paths; None means the folder of the list.
        num_classes: None means one more than the largest label (at least 1).
        still: the files are images.
    """
    listing = existing(list_file, "pathlist", 'the list of "path label" lines')
    folder = (
        existing(root, "pathlist", "the folder of the listed files")
        if root is not None
        else listing.parent
    )
    files, labels = [], []
    for line in text_lines(listing):
        path, _, last = line.rpartition(" ")
        labelled = bool(path) and last.lstrip("-").isdigit()
        files.append(path.strip() if labelled else line)
        labels.append(int(last) if labelled else -1)
    return FileClips(
        listing.stem,
        folder,
        files,
        labels,
        num_classes if num_classes is not None else max([0, *labels]) + 1,
        still=still,
    )
