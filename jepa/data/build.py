"""From a configuration to a data set: the names that runs use for what they train and evaluate
on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jepa.config import ConfigError
from jepa.data.clip import ClipDataset
from jepa.data.diving48 import diving48
from jepa.data.imagenet100 import imagenet100
from jepa.data.mixture import Epochs, Picker, mixed_regime
from jepa.data.moving_shapes import MovingShapes
from jepa.data.moving_textures import MovingTextures, TextureOptions
from jepa.data.pathlist import pathlist
from jepa.data.ssv2 import ssv2
from jepa.data.ucf101 import ucf101

Kind = Literal[
    "moving_textures",
    "moving_shapes",
    "ucf101",
    "ssv2",
    "diving48",
    "imagenet100",
    "list",
    "mixed",
]
# Drawn at the size asked for, whole: no files, no canvas around a view.
GENERATED = ("moving_textures", "moving_shapes")


@dataclass(frozen=True)
class Location:
    """Where one data set is: its files, and its lists, annotations or classes (each loader's
    docstring says what it expects)."""

    files: Path | None = None
    """Folder of the videos or images."""
    lists: Path | None = None
    """Folder or file of the official lists or annotations."""
    classes: Path | None = None
    """File that names the classes."""
    list_file: Path | None = None
    """Text file of paths (and labels), for kind `list`."""
    test_files: Path | None = None
    """`files` of the test split; null: the same."""
    test_lists: Path | None = None
    """`lists` of the test split; null: the same."""
    test_list_file: Path | None = None
    """`list_file` of the test split; null: the same."""


@dataclass(frozen=True)
class DataConfig:
    """What to train or evaluate on."""

    kind: Kind = "moving_shapes"
    """A data set; mixed is UCF-101 .2, Something-Something V2 .6, ImageNet-100 .2."""
    at: Location = Location()
    """Where it is; not needed for generated clips."""
    ucf101: Location = Location()
    """Where the UCF-101 part of `mixed` is."""
    ssv2: Location = Location()
    """Where the Something-Something V2 part of `mixed` is."""
    imagenet100: Location = Location()
    """Where the ImageNet-100 part of `mixed` is."""
    size: int = 10_000
    """Generated training clips."""
    test_size: int = 1_000
    """Generated test clips."""
    seed: int = 0

    """Of generated clips."""
    target: str | None = None
    """The factor of generated clips that labels give; null: the first."""
    textures: TextureOptions = field(default_factory=TextureOptions)
    """What varies in moving_textures, and how."""
    fold: int = 1
    """Split of UCF-101, 1 to 3."""
    repeat_stills: bool = False
    """A still becomes a clip of equal frames, as in the published code."""


def build_dataset(config: DataConfig, split: Literal["train", "test"] = "train") -> ClipDataset:
    """The data set of one split.

    Raises:
        ConfigError: a place that must be given is not, or ``mixed``, which is no single data set.
        MissingDataError: nothing is where the configuration says.
    """
    if config.kind in GENERATED:
        size = config.size if split == "train" else config.test_size
        if config.kind == "moving_textures":
            return MovingTextures(size, config.seed, split, config.target, config.textures)
        return MovingShapes(size, config.seed, split, config.target)
    if config.kind == "mixed":
        raise ConfigError("config: data.kind must be a single data set here, got 'mixed'.")
    return _at(config.kind, config.at, split, config.fold, "data.at")


def build_picker(config: DataConfig) -> Picker:
    """What pre-training draws from: epochs of one data set, or the mixed regime."""
    if config.kind != "mixed":
        return Epochs(build_dataset(config), repeat_stills=config.repeat_stills)
    parts = [
        _at(kind, getattr(config, kind), "train", config.fold, f"data.{kind}")
        for kind in ("ucf101", "ssv2", "imagenet100")
    ]
    return mixed_regime(*parts, repeat_stills=config.repeat_stills)


def _at(kind: str, place: Location, split: str, fold: int, path: str) -> ClipDataset:
    def need(name: str) -> Path:
        value: Path | None = getattr(place, name)
        if value is None:
            raise ConfigError(f"config: {path}.{name} must be given for {kind}.")
        return value

    test = split == "test"
    if kind == "ucf101":
        return ucf101(
            need("files"),
            need("lists"),
            split,
            fold,
            place.test_list_file if test else place.list_file,
        )
    if kind == "list":
        return pathlist(need("test_list_file" if test else "list_file"), place.files)
    files = need("files") if not test or place.test_files is None else place.test_files
    if kind == "imagenet100":
        return imagenet100(files if not test else need("test_files"), need("classes"))
    lists = need("test_lists" if test else "lists")
    return ssv2(files, lists, need("classes")) if kind == "ssv2" else diving48(files, lists)
