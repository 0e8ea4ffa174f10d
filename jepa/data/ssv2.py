"""Something-Something V2: hand-object actions as VP9 .webm files, 174 classes by template."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from jepa.data.files import FileClips, existing, text_lines

NUM_CLASSES = 174
# A template that says so changes its meaning when the picture is mirrored.
_SIDES = ("left", "right")


def ssv2(videos: str | Path, annotations: str | Path, classes: str | Path) -> FileClips:
    """Something-Something V2.

    Args:
        videos: folder of `<id>.webm` (20bn-something-something-v2/ in the archive).
        annotations: train.json, validation.json or test.json as published (a list of records with
            "id" and, but for the test set, "template"), or a .csv with a line `id;label` or
            `id,label` per clip (a header is skipped), the label being a number or a template.
        classes: labels.json as published: {template: number}.
    """
    root = existing(videos, "ssv2", "the folder of .webm files")
    listing = existing(annotations, "ssv2", "the annotation file (.json or .csv)")
    numbers = _class_numbers(existing(classes, "ssv2", "labels.json, the class of each template,"))
    pairs = _json_pairs(listing) if listing.suffix == ".json" else _csv_pairs(listing)
    files = [f"{name}.webm" for name, _ in pairs]
    labels = [_number(text, numbers, listing.name) for _, text in pairs]
    mirrored = {
        number
        for template, number in numbers.items()
        if any(side in template.split() for side in _SIDES)
    }
    return FileClips("ssv2", root, files, labels, NUM_CLASSES, no_flip=mirrored)


def _plain(template: str) -> str:
    """Annotation files write "[something]", the class list "something"; spelling of case and blanks
    varies."""
    return " ".join(template.replace("[", "").replace("]", "").lower().split())


def _class_numbers(path: Path) -> dict[str, int]:
    return {
        _plain(template): int(number)
        for template, number in json.loads(path.read_text(encoding="utf-8")).items()
    }


def _json_pairs(path: Path) -> list[tuple[str, str]]:
    records = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(records, list) or any("id" not in record for record in records):
        raise ValueError(
            f"ssv2: {path.name} must be a list of records with an id, got something else."
        )
    return [
        (str(record["id"]), str(record.get("template", record.get("label", ""))))
        for record in records
    ]


def _csv_pairs(path: Path) -> list[tuple[str, str]]:
    lines = text_lines(path)
    delimiter = ";" if lines and ";" in lines[0] else ","
    rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    if rows and not rows[0][0].strip().isdigit():
        rows = rows[1:]
    # Without quotes, a template with commas comes in several cells.
    return [(row[0].strip(), delimiter.join(row[1:]).strip()) for row in rows]


def _number(text: str, numbers: dict[str, int], source: str) -> int:
    if not text:
        return -1
    if text.isdigit():
        return int(text)
    if _plain(text) not in numbers:
        raise ValueError(f"ssv2: {source} must use templates of the class list, got {text!r}.")
    return numbers[_plain(text)]
