"""ImageNet-100: the images of a hundred ImageNet classes, as clips of one frame."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from jepa.config import ConfigError
from jepa.data.files import IMAGES, FileClips, existing, text_lines

_log = logging.getLogger(__name__)


def imagenet100(images: str | Path, classes: str | Path) -> FileClips:
    """A subset of ImageNet classes.

    Args:
        images: folder with one folder per class (n01558993/ ...), such as ImageNet's train/ or val/
            sorted into classes.
        classes: a text file with one class folder per line (further words of a line are ignored);
            its order numbers the labels.
    """
    root = existing(images, "imagenet100", "the folder of class folders")
    names = [
        re.split(r"[ \t,;]", line.text)[0]
        for line in text_lines(
            existing(classes, "imagenet100", "the list of class folders"), "imagenet100"
        )
    ]
    if len(set(names)) != len(names):
        raise ConfigError("imagenet100: classes must be distinct, got a repeated one.")
    files, labels = [], []
    for label, name in enumerate(names):
        folder = existing(root / name, "imagenet100", f"the folder of class {name}")
        images_here = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGES)
        if not images_here:
            _log.warning("imagenet100: %s holds no images", folder)
        files += [f"{name}/{image}" for image in images_here]
        labels += [label] * len(images_here)
    return FileClips("imagenet100", root, files, labels, len(names), still=True)
