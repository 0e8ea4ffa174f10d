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
    lists: Path | None = None
    classes: Path | None = None
    list_file: Path | None = None
    test_files: Path | None = None
    test_lists: Path | None = None
    test_list_file: Path | None = None


@dataclass(frozen=True)
class DataConfig:
    """What to train or evaluate on.

    Args:
        kind: a data set, or ``mixed`` for the mixed regime (UCF-101 .2, Something-Something V2 .6,
            ImageNet-100 .2).
        at: where it is; not needed for generated clips.
        ucf101, ssv2, imagenet100: where the three parts of ``mixed`` are.
        size, test_size: number of generated clips. target: their factor that labels give, None for
            the first. textures: what varies in moving_textures, and how.
        fold: split of UCF-101. repeat_stills: stills become clips of equal frames, as in the
            published code (also a quirk of that name).
    """

    kind: Kind = "moving_shapes"
    at: Location = Location()
    ucf101: Location = Location()
    ssv2: Location = Location()
    imagenet100: Location = Location()
    size: int = 10_000
    test_size: int = 1_000
    seed: int = 0
    target: str | None = None
    textures: TextureOptions = field(default_factory=TextureOptions)
    fold: int = 1
    repeat_stills: bool = False


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
        value = getattr(place, name)
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
