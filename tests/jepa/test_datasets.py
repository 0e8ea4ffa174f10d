"""File lists of the named data sets, and which samples a step picks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from jepa.data.clip import BadClipError, ClipSpec, MissingDataError
from jepa.data.diving48 import diving48
from jepa.data.files import FileClips
from jepa.data.imagenet100 import imagenet100
from jepa.data.mixture import Epochs, InOrder, Mixture, mixed_regime
from jepa.data.pathlist import pathlist
from jepa.data.ssv2 import ssv2
from jepa.data.ucf101 import ucf101

SMALL = ClipSpec(4, 2, None, 32, 32)


@pytest.mark.parametrize(
    ("split", "fold", "size"),
    [("train", 1, 9537), ("test", 1, 3783), ("train", 3, 9624), ("test", 2, 3734)],
)
def test_ucf101_official_lists(shared_dir, split, fold, size):
    """CRLF lists, the test ones without labels; classes from the folder."""
    data = ucf101(
        shared_dir / "clips" / "ucf101" / "videos",
        shared_dir / "clips" / "ucf101_splits",
        split,
        fold,
    )
    assert len(data) == size
    assert {data.label(i) for i in range(size)} == set(range(101))
    assert not any(name.endswith("\r") for name in data.files)
    assert data.label(0) == 0


def test_ucf101_subset_and_reading(shared_dir):
    folder = shared_dir / "clips"
    for name, size in (("trainlist01_subset.txt", 126), ("testlist01_subset.txt", 49)):
        data = ucf101(
            folder / "ucf101" / "videos",
            folder / "ucf101_splits",
            list_file=folder / "ucf101" / name,
        )
        assert len(data) == size
        assert len({data.label(i) for i in range(size)}) == 7
    clip = data.read(3, SMALL, 0.3)
    assert clip.frames.shape == (4, 32, 32, 3)
    assert (clip.source_height, clip.source_width) == (240, 320)
    whole = ucf101(folder / "ucf101" / "videos", folder / "ucf101_splits", "test", 1)
    absent = next(i for i in range(len(whole)) if not Path(whole.where(i)).exists())
    with pytest.raises(BadClipError, match=r"\.avi"):
        whole.read(absent, SMALL, 0.0)


def test_ucf101_refuses_lists_that_contradict_the_class_index(tmp_path):
    (tmp_path / "classInd.txt").write_bytes(b"1 Archery\r\n2 Surfing\r\n")
    (tmp_path / "trainlist01.txt").write_bytes(b"Archery/v_a.avi 2\r\n")
    with pytest.raises(
        ValueError, match=r"must agree with classInd.txt, got 'Archery/v_a.avi 2' for class 1"
    ):
        ucf101(tmp_path, tmp_path)
    (tmp_path / "trainlist01.txt").write_bytes(b"Rowing/v_a.avi 2\r\n")
    with pytest.raises(ValueError, match=r"must name classes of classInd.txt, got 'Rowing'"):
        ucf101(tmp_path, tmp_path)


@pytest.fixture
def ssv2_classes(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(
        json.dumps(
            {
                "Pretending to pick something up": "0",
                "Pushing something from left to right": "1",
                "Dropping something into something": "2",
            }
        )
    )
    return path


def test_ssv2_json(shared_dir, tmp_path, ssv2_classes):
    records = [
        {
            "id": "2",
            "label": "pretending to pick a pillow up",
            "template": "Pretending to pick [something] up",
        },
        {
            "id": "57082",
            "label": "dropping a key into a cup",
            "template": "Dropping [something] into [something]",
        },
        {"id": "4", "label": "pushing", "template": "Pushing [something] from left to right"},
        {"id": "862"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    data = ssv2(shared_dir / "clips" / "ssv2", tmp_path / "train.json", ssv2_classes)
    assert [data.label(i) for i in range(4)] == [0, 2, 1, -1]
    assert [data.may_flip(i) for i in range(4)] == [True, True, False, True]
    assert data.num_classes == 174
    assert data.read(0, SMALL, 0.5).frames.shape == (4, 32, 32, 3)
    (tmp_path / "train.json").write_text(
        json.dumps([{"id": "2", "template": "Juggling [something]"}])
    )
    with pytest.raises(
        ValueError, match=r"must use templates of the class list, got 'Juggling \[something\]'"
    ):
        ssv2(shared_dir / "clips" / "ssv2", tmp_path / "train.json", ssv2_classes)


@pytest.mark.parametrize(
    "text",
    [
        "2;Pretending to pick something up\n4;Pushing [something] from left to right\n",
        "id,label\n2,0\n4,1\n",
        "2,Pretending to pick something up\r\n4,1\r\n",
    ],
)
def test_ssv2_csv(shared_dir, tmp_path, ssv2_classes, text):
    (tmp_path / "list.csv").write_bytes(text.encode())
    data = ssv2(shared_dir / "clips" / "ssv2", tmp_path / "list.csv", ssv2_classes)
    assert data.files == ["2.webm", "4.webm"]
    assert data.labels == [0, 1]
    assert [data.may_flip(i) for i in range(2)] == [True, False]


def test_diving48(tmp_path):
    (tmp_path / "rgb").mkdir()
    path = tmp_path / "Diving48_V2_train.json"
    path.write_text(
        json.dumps(
            [
                {"vid_name": "a_00001", "label": 47, "start_frame": 0, "end_frame": 9},
                {"vid_name": "b_00002", "label": 0},
            ]
        )
    )
    data = diving48(tmp_path / "rgb", path)
    assert data.labels == [47, 0]
    assert data.where(1).endswith("rgb/b_00002.mp4")
    path.write_text(json.dumps([{"vid_name": "a", "label": 48}]))
    with pytest.raises(ValueError, match="labels must be below 48, got 48"):
        diving48(tmp_path / "rgb", path)


def test_imagenet100(shared_dir):
    folder = shared_dir / "clips" / "imagenet100"
    data = imagenet100(folder, folder / "imagenet100.txt")
    assert len(data) == 100
    assert data.num_classes == 100
    assert data.still
    names = (folder / "imagenet100.txt").read_text().split()
    assert [Path(data.where(i)).parent.name for i in range(100)] == names
    assert data.labels == list(range(100))
    assert data.read(0, SMALL, 0.0).frames.shape == (1, 32, 32, 3)


def test_pathlist(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a b.mp4 3\r\n/abs/c.mp4 0\nplain.mp4\n\n")
    data = pathlist(tmp_path / "list.txt")
    assert data.files == ["a b.mp4", "/abs/c.mp4", "plain.mp4"]
    assert data.labels == [3, 0, -1]
    assert data.num_classes == 4
    assert data.where(1) == "/abs/c.mp4"
    assert data.where(0) == str(tmp_path / "a b.mp4")


def test_missing_data_is_one_sentence(tmp_path):
    cases = [
        lambda: ucf101(tmp_path / "no", tmp_path),
        lambda: ucf101(tmp_path, tmp_path),
        lambda: ssv2(tmp_path, tmp_path / "train.json", tmp_path / "labels.json"),
        lambda: diving48(tmp_path / "rgb", tmp_path / "x.json"),
        lambda: imagenet100(tmp_path / "train", tmp_path / "list.txt"),
        lambda: pathlist(tmp_path / "list.txt"),
    ]
    for make in cases:
        with pytest.raises(MissingDataError) as error:
            make()
        sentence = str(error.value)
        assert "must be at" in sentence
        assert str(tmp_path) in sentence
        assert sentence.count("\n") == 0


def fake(name, size, still=False):
    return FileClips(
        name, Path("/none"), [f"{i}.mp4" for i in range(size)], [0] * size, 1, still=still
    )


def test_epochs_visit_every_sample_once():
    data = Epochs(fake("a", 10))
    seen = [
        p.index
        for step in range(10)
        for rank in range(2)
        for p in data.pick(5, step, np.array([2 * rank, 2 * rank + 1]), 4)
    ]
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    # Any step alone gives the same picks: that is what a resume does.
    assert [p.index for p in data.pick(5, 7, np.arange(4), 4)] == seen[28:32]


def test_in_order_ends_with_the_list():
    data = InOrder(fake("a", 10))
    assert data.steps(4) == 3
    assert [[p.index for p in data.pick(0, step, np.arange(4), 4)] for step in range(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
        [],
    ]


def test_mixture_shares_and_modalities():
    parts = (fake("ucf101", 50), fake("ssv2", 70), fake("imagenet100", 30, still=True))
    slots = np.arange(8)
    steps = [mixed_regime(*parts).pick(3, step, slots, 8) for step in range(1500)]
    assert all(len({p.dataset.still for p in picks}) == 1 for picks in steps)
    # Steps are independent, samples within one share their kind: test the kinds of steps and the
    # samples of video steps apart.
    still = sum(picks[0].dataset.still for picks in steps)
    assert stats.binomtest(still, len(steps), 0.2).pvalue > 1e-3
    videos = [p.dataset.name for picks in steps for p in picks if not p.dataset.still]
    assert stats.binomtest(videos.count("ucf101"), len(videos), 0.25).pvalue > 1e-3
    ids = [p.sample_id for picks in steps for p in picks]
    assert set(ids) == set(range(150))
    assert all((p.sample_id >= 120) == p.dataset.still for picks in steps for p in picks)
    for step in (3, 900):
        again = mixed_regime(*parts).pick(3, step, np.array([5, 2]), 8)
        assert again == [steps[step][5], steps[step][2]]


def test_mixture_with_repeated_stills_mixes_within_a_batch():
    mixture = Mixture((fake("a", 5), fake("b", 5, still=True)), (0.5, 0.5), repeat_stills=True)
    kinds = [
        {p.dataset.still for p in mixture.pick(0, step, np.arange(8), 8)} for step in range(20)
    ]
    assert sum(len(kind) == 2 for kind in kinds) > 10


def test_images_of_any_mode_read_as_three_channels(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK"):
        Image.new(mode, (9, 7)).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    (tmp_path / "list.txt").write_text("L.png 0\nRGBA.png 0\nP.png 0\nCMYK.jpg 0\n")
    data = pathlist(tmp_path / "list.txt", still=True)
    assert {data.read(i, SMALL, 0.0).frames.shape for i in range(4)} == {(1, 32, 32, 3)}
