"""Diving-48 V2: competitive dives, 48 classes that differ in motion only."""

from __future__ import annotations

import json
from pathlib import Path

from jepa.data.files import FileClips, existing

NUM_CLASSES = 48


def diving48(videos: str | Path, annotations: str | Path) -> FileClips:
    """Diving-48.

    Args:
        videos: folder of `<vid_name>.mp4` (rgb/ in the archive).
        annotations: Diving48_V2_train.json or Diving48_V2_test.json: a list of records with
            "vid_name" and "label".
    """
    root = existing(videos, "diving48", "the folder of .mp4 files")
    listing = existing(
        annotations,
        "diving48",
        "the annotation file (Diving48_V2_train.json or Diving48_V2_test.json)",
    )
    records = json.loads(listing.read_text(encoding="utf-8"))
    if not isinstance(records, list) or any(
        "vid_name" not in record or "label" not in record for record in records
    ):
        raise ValueError(
            f"diving48: {listing.name} must be a list of records with vid_name and label, got "
            "something else."
        )
    files = [f"{record['vid_name']}.mp4" for record in records]
    return FileClips(
        "diving48", root, files, [int(record["label"]) for record in records], NUM_CLASSES
    )
