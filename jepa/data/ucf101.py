"""UCF-101: action clips with three official splits."""

from __future__ import annotations

from pathlib import Path

from jepa.config import ConfigError
from jepa.data.files import FileClips, existing, text_lines, whole_number

NUM_CLASSES = 101


def ucf101(
    videos: str | Path,
    lists: str | Path,
    split: str = "train",
    fold: int = 1,
    list_file: str | Path | None = None,
) -> FileClips:
    """UCF-101 by its official lists.

    Args:
        videos: folder of `<Class>/v_<Class>_gNN_cNN.avi` (UCF-101/ in the archive).
        lists: folder with classInd.txt, trainlist0N.txt, testlist0N.txt (ucfTrainTestlist/ in the
            archive).
        split: "train" or "test".
        fold: 1, 2 or 3.
        list_file: another list in the same format, such as a subset; then `split` and `fold` do not
            matter.

    Labels come from the class folder (numbered from 0 by classInd.txt): test lists carry none. A
    number that a train list gives is checked.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"ucf101: split must be 'train' or 'test', got {split!r}.")
    if fold not in (1, 2, 3):
        raise ConfigError(f"ucf101: fold must be 1, 2 or 3, got {fold}.")
    root = existing(videos, "ucf101", "the folder of class folders with .avi files")
    folder = existing(lists, "ucf101", "the folder with classInd.txt and the split lists")
    classes = _class_numbers(existing(folder / "classInd.txt", "ucf101", "the class index"))
    chosen = Path(list_file) if list_file is not None else folder / f"{split}list{fold:02d}.txt"
    files, labels = [], []
    for line in text_lines(existing(chosen, "ucf101", "the split list"), "ucf101"):
        name, _, number = line.text.replace("\t", " ").rpartition(" ")
        if whole_number(number) is None:
            name, number = line.text, ""
        name = name.rstrip()
        # Lists of a subset may carry folders before the class folder.
        class_name = Path(name).parent.name
        if class_name not in classes:
            raise ConfigError(
                f"ucf101: {chosen.name} must name classes of classInd.txt, got {class_name!r} in "
                f"{line.text!r}."
            )
        if number and whole_number(number) != classes[class_name] + 1:
            raise ConfigError(
                f"ucf101: {chosen.name} must agree with classInd.txt, got {line.text!r} for class "
                f"{classes[class_name] + 1}."
            )
        files.append(name)
        labels.append(classes[class_name])
    return FileClips("ucf101", root, files, labels, NUM_CLASSES)


def _class_numbers(path: Path) -> dict[str, int]:
    classes: dict[str, int] = {}
    for line in text_lines(path, "ucf101"):
        number, _, name = line.text.replace("\t", " ").partition(" ")
        name, value = name.strip(), whole_number(number)
        if not name or " " in name or value is None:
            raise line.refused("ucf101", "hold lines of number and class name")
        if not 1 <= value <= NUM_CLASSES:
            raise line.refused("ucf101", f"number classes from 1 to {NUM_CLASSES}")
        if name in classes or value - 1 in classes.values():
            raise line.refused("ucf101", "give each class and number once")
        classes[name] = value - 1
    return classes
