"""Diving-48 V2: competitive dives, 48 classes that differ in motion only."""

from __future__ import annotations

from pathlib import Path

from jepa.config import ConfigError
from jepa.data.files import FileClips, existing, read_json

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
    records = read_json(listing, "diving48")
    if not isinstance(records, list):
        records = [records]
    for record in records:
        label = record.get("label") if isinstance(record, dict) else None
        named = isinstance(record, dict) and isinstance(record.get("vid_name"), str)
        if not named or type(label) is not int or label < 0:
            raise ConfigError(
                f"diving48: {listing.name} must be a list of records with vid_name and label "
                f"(a whole number from 0 on), got {record!r:.120}."
            )
    files = [f"{record['vid_name']}.mp4" for record in records]
    return FileClips("diving48", root, files, [record["label"] for record in records], NUM_CLASSES)
