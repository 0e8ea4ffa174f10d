"""UCF-101: action clips with three official splits."""

from __future__ import annotations

from pathlib import Path

from jepa.data.files import FileClips, existing, text_lines

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
        raise ValueError(f"ucf101: split must be 'train' or 'test', got {split!r}.")
    if fold not in (1, 2, 3):
        raise ValueError(f"ucf101: fold must be 1, 2 or 3, got {fold}.")
    root = existing(videos, "ucf101", "the folder of class folders with .avi files")
    folder = existing(lists, "ucf101", "the folder with classInd.txt and the split lists")
    classes = _class_numbers(existing(folder / "classInd.txt", "ucf101", "the class index"))
    chosen = Path(list_file) if list_file is not None else folder / f"{split}list{fold:02d}.txt"
    files, labels = [], []
    for line in text_lines(existing(chosen, "ucf101", "the split list")):
        name, _, number = line.partition(" ")
        # Lists of a subset may carry folders before the class folder.
        class_name = Path(name).parent.name
        if class_name not in classes:
            raise ValueError(
                f"ucf101: {chosen.name} must name classes of classInd.txt, got {class_name!r} in "
                f"{line!r}."
            )
        if number and int(number) - 1 != classes[class_name]:
            raise ValueError(
                f"ucf101: {chosen.name} must agree with classInd.txt, got {line!r} for class "
                f"{classes[class_name] + 1}."
            )
        files.append(name)
        labels.append(classes[class_name])
    return FileClips("ucf101", root, files, labels, NUM_CLASSES)


def _class_numbers(path: Path) -> dict[str, int]:
    pairs = [line.split() for line in text_lines(path)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"ucf101: {path.name} must hold lines of number and class name, got "
            f"{next(p for p in pairs if len(p) != 2)}."
        )
    return {name: int(number) - 1 for number, name in pairs}
