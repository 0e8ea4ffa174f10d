"""Something-Something V2: hand-object actions as VP9 .webm files, 174 classes by template."""

from __future__ import annotations

import csv
from pathlib import Path

from jepa.config import ConfigError
from jepa.data.files import FileClips, existing, read_json, text_lines, whole_number

NUM_CLASSES = 174
# A template that says so changes its meaning when the picture is mirrored.
_SIDES = ("left", "right")
_HEADERS = ("id", "video", "video_id", "clip", "name", "file", "label", "template", "class")


def ssv2(videos: str | Path, annotations: str | Path, classes: str | Path) -> FileClips:
    """Something-Something V2.

    Args:
        videos: folder of `<id>.webm` (20bn-something-something-v2/ in the archive).
        annotations: train.json, validation.json or test.json as published (a list of records with
            "id" and, but for the test set, "template"), or a .csv with a line `id;label` or
            `id,label` per clip (tabs do as well, and a header is skipped), the label being a number
            or a template.
        classes: labels.json as published: {template: number}.
    """
    root = existing(videos, "ssv2", "the folder of .webm files")
    listing = existing(annotations, "ssv2", "the annotation file (.json or .csv)")
    numbers = _class_numbers(existing(classes, "ssv2", "labels.json, the class of each template,"))
    pairs = _json_pairs(listing) if listing.suffix == ".json" else _csv_pairs(listing)
    files = [f"{name}.webm" for name, _, _ in pairs]
    labels = [_number(text, numbers, f"{listing.name}, {where},") for _, text, where in pairs]
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
    classes = read_json(path, "ssv2")
    numbers = {}
    pairs = classes.items() if isinstance(classes, dict) else [("", type(classes).__name__)]
    for template, number in pairs:
        value = whole_number(str(number))
        if value is None or not 0 <= value < NUM_CLASSES:
            raise ConfigError(
                f"ssv2: {path.name} must map templates to numbers below {NUM_CLASSES}, got "
                f"{number!r:.120} for {template!r}."
            )
        numbers[_plain(template)] = value
    return numbers


def _json_pairs(path: Path) -> list[tuple[str, str, str]]:
    records = read_json(path, "ssv2")
    if not isinstance(records, list) or any(
        not isinstance(record, dict) or "id" not in record for record in records
    ):
        raise ConfigError(
            f"ssv2: {path.name} must be a list of records with an id, got something else."
        )
    return [
        (
            str(record["id"]),
            str(record.get("template", record.get("label", ""))),
            f"record {number}",
        )
        for number, record in enumerate(records)
    ]


def _csv_pairs(path: Path) -> list[tuple[str, str, str]]:
    lines = text_lines(path, "ssv2")
    delimiter = next((mark for mark in ";\t" if lines and mark in lines[0].text), ",")
    pairs = []
    for line in lines:
        try:
            cells = next(csv.reader([line.text], delimiter=delimiter, strict=True))
        except csv.Error:
            raise line.refused("ssv2", "hold lines of id and label") from None
        # Without quotes, a template with commas comes in several cells.
        name, label = cells[0].strip(), delimiter.join(cells[1:]).strip()
        if line is lines[0] and (name.lower() in _HEADERS or label.lower() in _HEADERS):
            continue
        if not name or any(mark in name for mark in " \t,;"):
            raise line.refused("ssv2", "hold lines of id and label")
        pairs.append((name, label, f"line {line.number}"))
    return pairs


def _number(text: str, numbers: dict[str, int], source: str) -> int:
    if not text:
        return -1
    value = whole_number(text)
    if value is not None and value < NUM_CLASSES:
        return value
    if _plain(text) not in numbers:
        raise ConfigError(f"ssv2: {source} must use templates of the class list, got {text!r}.")
    return numbers[_plain(text)]
