"""From a configuration to data sets: every name, the weighted mixture, and one sentence for what is
missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from jepa.config import ConfigError, from_dict
from jepa.data.build import DataConfig, Kind, Location, build_dataset, build_picker
from jepa.data.clip import MissingDataError
from jepa.data.mixture import Epochs, Mixture

NAMES = ("moving_textures", "moving_shapes", "ucf101", "ssv2", "diving48", "imagenet100", "list")


@pytest.fixture
def places(tmp_path) -> dict[str, Location]:
    """Lists as each data set has them, two training entries and one test entry; only the images are
    real files."""
    for folder in (
        "ucf",
        "lists",
        "ssv2",
        "rgb",
        *(f"{part}/{name}" for part in ("train", "val") for name in ("n01", "n02")),
    ):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "lists" / "classInd.txt").write_text("1 Archery\n2 Surfing\n")
    for fold in (1, 2):
        (tmp_path / "lists" / f"trainlist{fold:02d}.txt").write_text(
            f"Archery/v_{fold}.avi 1\nSurfing/v_{fold}.avi 2\n"
        )
        (tmp_path / "lists" / f"testlist{fold:02d}.txt").write_text(f"Surfing/v_test{fold}.avi\n")
    (tmp_path / "labels.json").write_text(
        json.dumps({"Pushing something": "0", "Turning something": "1"})
    )
    pushing, turning = ({"template": f"{verb} [something]"} for verb in ("Pushing", "Turning"))
    (tmp_path / "train.json").write_text(
        json.dumps([{"id": "7", **turning}, {"id": "8", **pushing}])
    )
    (tmp_path / "validation.json").write_text(json.dumps([{"id": "9", **turning}]))
    dives = [{"vid_name": name, "label": label} for name, label in (("a", 3), ("b", 47), ("c", 5))]
    (tmp_path / "dive_train.json").write_text(json.dumps(dives[:2]))
    (tmp_path / "dive_test.json").write_text(json.dumps(dives[2:]))
    (tmp_path / "classes.txt").write_text("n01\nn02\n")
    for folder, count in (("train/n01", 1), ("train/n02", 1), ("val/n02", 1)):
        for i in range(count):
            Image.new("RGB", (40, 30)).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "train.txt").write_text("x.mp4 0\ny.mp4 4\n")
    (tmp_path / "test.txt").write_text("z.mp4 1\n")
    at = {
        "ucf101": {"files": "ucf", "lists": "lists"},
        "ssv2": {
            "files": "ssv2",
            "lists": "train.json",
            "test_lists": "validation.json",
            "classes": "labels.json",
        },
        "diving48": {"files": "rgb", "lists": "dive_train.json", "test_lists": "dive_test.json"},
        "imagenet100": {"files": "train", "test_files": "val", "classes": "classes.txt"},
        "list": {"list_file": "train.txt", "test_list_file": "test.txt"},
        "moving_textures": {},
        "moving_shapes": {},
    }
    return {
        name: Location(**{key: tmp_path / value for key, value in entry.items()})
        for name, entry in at.items()
    }


def names_and_labels(dataset) -> list[tuple[str, int]]:
    return [(Path(dataset.where(i)).name, dataset.label(i)) for i in range(len(dataset))]


EXPECTED = {
    "ucf101": ([("v_1.avi", 0), ("v_1.avi", 1)], [("v_test1.avi", 1)], 101),
    "ssv2": ([("7.webm", 1), ("8.webm", 0)], [("9.webm", 1)], 174),
    "diving48": ([("a.mp4", 3), ("b.mp4", 47)], [("c.mp4", 5)], 48),
    "imagenet100": ([("0.png", 0), ("0.png", 1)], [("0.png", 1)], 2),
    "list": ([("x.mp4", 0), ("y.mp4", 4)], [("z.mp4", 1)], None),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_name_reads_its_own_lists(places, name):
    train, test = (
        build_dataset(DataConfig(kind=name, at=places[name]), split) for split in ("train", "test")
    )
    expected_train, expected_test, classes = EXPECTED[name]
    assert names_and_labels(train) == expected_train
    assert names_and_labels(test) == expected_test
    if classes is not None:
        assert train.num_classes == test.num_classes == classes
    assert train.still == (name == "imagenet100")
    picker = build_picker(DataConfig(kind=name, at=places[name]))
    assert isinstance(picker, Epochs)
    assert sorted(p.index for p in picker.pick(0, 0, np.arange(2), 2)) == [0, 1]


def test_moving_shapes_needs_no_place():
    config = DataConfig(size=7, test_size=3, target="direction")
    train, test = (build_dataset(config, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7, 3)
    assert train.num_classes == build_dataset(replace(config, target="direction")).num_classes
    assert {build_picker(config).datasets[0].name} == {train.name}


def test_another_fold_and_a_list_of_ones_own(places, tmp_path):
    second = build_dataset(DataConfig(kind="ucf101", at=places["ucf101"], fold=2))
    assert names_and_labels(second) == [("v_2.avi", 0), ("v_2.avi", 1)]
    (tmp_path / "few.txt").write_text("Surfing/v_9.avi\n")
    own = replace(
        places["ucf101"], list_file=tmp_path / "few.txt", test_list_file=tmp_path / "few.txt"
    )
    for split in ("train", "test"):
        assert names_and_labels(build_dataset(DataConfig(kind="ucf101", at=own), split)) == [
            ("v_9.avi", 1)
        ]


def test_the_mixture_draws_by_its_weights(places):
    parts = {name: places[name] for name in ("ucf101", "ssv2", "imagenet100")}
    for repeat in (False, True):
        picker = build_picker(DataConfig(kind="mixed", **parts, repeat_stills=repeat))
        assert isinstance(picker, Mixture)
        assert picker.repeat_stills == repeat
        assert [d.name for d in picker.datasets] == ["ucf101", "ssv2", "imagenet100"]
    # With repeated stills every sample is drawn on its own, so the shares are those of a
    # multinomial.
    drawn = [p.dataset.name for step in range(400) for p in picker.pick(1, step, np.arange(8), 8)]
    counts = [drawn.count(name) for name in ("ucf101", "ssv2", "imagenet100")]
    assert stats.chisquare(counts, np.array([0.2, 0.6, 0.2]) * len(drawn)).pvalue > 1e-3


def test_a_mixture_is_no_data_set_to_evaluate_on(places):
    with pytest.raises(
        ConfigError, match=r"data\.kind must be a single data set here, got 'mixed'"
    ):
        build_dataset(DataConfig(kind="mixed"), "test")


NEEDS = {
    "ucf101": ("files", "lists"),
    "ssv2": ("files", "lists", "classes"),
    "diving48": ("files", "lists"),
    "imagenet100": ("files", "classes"),
    "list": ("list_file",),
}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in NEEDS.items() for key in keys]
)
def test_what_is_not_given_or_not_there_is_one_sentence(places, tmp_path, name, key):
    config = DataConfig(kind=name, at=replace(places[name], **{key: None}))
    with pytest.raises(ConfigError, match=rf"^config: data\.at\.{key} must be given for {name}\.$"):
        build_dataset(config)
    absent = tmp_path / "absent"
    with pytest.raises(MissingDataError) as error:
        build_dataset(replace(config, at=replace(places[name], **{key: absent})))
    sentence = str(error.value)
    assert "must be at" in sentence
    assert str(absent) in sentence
    assert sentence.count("\n") == 0


@pytest.mark.parametrize("name", ["ssv2", "diving48", "imagenet100", "list"])
def test_a_test_split_needs_a_place_of_its_own(places, name):
    key = {"imagenet100": "test_files", "list": "test_list_file"}.get(name, "test_lists")
    with pytest.raises(ConfigError, match=rf"data\.at\.{key} must be given for {name}"):
        build_dataset(DataConfig(kind=name, at=replace(places[name], **{key: None})), "test")


@pytest.mark.parametrize("part", ["ucf101", "ssv2", "imagenet100"])
def test_a_mixture_names_the_part_that_is_missing(places, part):
    parts = {name: places[name] for name in ("ucf101", "ssv2", "imagenet100") if name != part}
    with pytest.raises(ConfigError, match=rf"config: data\.{part}\.files must be given for {part}"):
        build_picker(DataConfig(kind="mixed", **parts))


def test_a_misspelt_name_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"data\.kind must be one of") as error:
        from_dict(DataConfig, {"kind": "ucf"}, "data")
    assert all(repr(name) in str(error.value) for name in (*NAMES, "mixed"))
    assert set(Kind.__args__) == {*NAMES, "mixed"}
