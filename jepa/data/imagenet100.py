"""ImageNet-100: the images of a hundred ImageNet classes, as clips of one frame."""

from __future__ import annotations

from pathlib import Path

from jepa.data.files import FileClips, existing, text_lines

_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp"}


def imagenet100(images: str | Path, classes: str | Path) -> FileClips:
    """A subset of ImageNet classes.

    Args:
        images: folder with one folder per class (n01558993/ ...), such as ImageNet's train/ or val/
            sorted into classes.
        classes: a text file with one class folder per line (further words on a line are ignored);
            its order numbers the labels.
    """
    root = existing(images, "imagenet100", "the folder of class folders")
    names = [
        line.split()[0]
        for line in text_lines(existing(classes, "imagenet100", "the list of class folders"))
    ]
    if len(set(names)) != len(names):
        raise ValueError("imagenet100: classes must be distinct, got a repeated one.")
    files, labels = [], []
    for label, name in enumerate(names):
        folder = existing(root / name, "imagenet100", f"the folder of class {name}")
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES):
            files.append(f"{name}/{path.name}")
            labels.append(label)
    return FileClips("imagenet100", root, files, labels, len(names), still=True)
