"""What is kept on disk is used again only for the same data; clips without a label or that cannot
be read are left out and counted, never replaced."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jepa import encode, finetune, pretrain, probe
from jepa.config import ConfigError
from jepa.data.build import DataConfig, Location
from jepa.data.clip import labelled
from jepa.data.pathlist import pathlist
from tests.jepa.run_cases import tiny_run

pytestmark = pytest.mark.usefixtures("_logged")


@pytest.fixture
def _logged(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    pretrain.run(tiny_run(folder, steps=1))
    return folder


@pytest.fixture
def clips(tmp_path):
    """Twelve animated pictures of two classes, bluish and reddish, each with a shade of its own,
    and lists of them."""
    for number in range(12):
        colour = (250, 10 * number, 20) if number % 2 else (20, 10 * number, 250)
        frames = [Image.new("RGB", (64, 64), colour) for _ in range(4)]
        for place, frame in enumerate(frames):
            frame.putpixel((place, 0), (255, 255, 255))
        frames[0].save(tmp_path / f"v{number}.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "bad.gif").write_bytes(b"junk" * 100)
    write(tmp_path / "train.txt", [(f"v{n}.gif", n % 2) for n in range(8)])
    write(tmp_path / "test.txt", [(f"v{n}.gif", n % 2) for n in range(8, 12)])
    return tmp_path


def write(path, pairs):
    path.write_text("".join(f"{name} {label}\n".replace(" None", "") for name, label in pairs))


def data(folder):
    lists = Location(
        files=folder, list_file=folder / "train.txt", test_list_file=folder / "test.txt"
    )
    return DataConfig(kind="list", at=lists)


def probed(run_folder, folder, **changes):
    values = dict(
        run=run_folder,
        data=data(folder),
        kinds=("linear",),
        steps=60,
        batch_size=8,
        learning_rates=(0.05,),
        weight_decays=(0.01,),
        untrained=False,
        pixels=False,
        threads=1,
        output=folder / "probe.json",
    )
    report = probe.run(probe.ProbeConfig(**{**values, **changes}))
    return report, report["results"]["linear"]["trained"]["questions"]["class"]["top1"]


def tuned(run_folder, folder, **changes):
    values = dict(
        run=run_folder,
        data=data(folder),
        steps=4,
        batch_size=4,
        warmup_steps=1,
        threads=1,
        output=folder / "tuned.json",
    )
    return finetune.run(finetune.FinetuneConfig(**{**values, **changes}))


def test_features_of_another_order_or_another_file_are_not_used(run_folder, clips):
    _, first = probed(run_folder, clips)
    assert first == 1.0
    write(clips / "test.txt", [(f"v{n}.gif", n % 2) for n in (8, 10, 9, 11)])
    assert probed(run_folder, clips)[1] == 1.0
    # The other class under the old name.
    for name, other in (("v8.gif", "v1.gif"), ("v10.gif", "v3.gif")):
        (clips / name).write_bytes((clips / other).read_bytes())
    assert probed(run_folder, clips)[1] == 0.5


def test_features_are_kept_for_the_same_data(run_folder, clips, monkeypatch):
    probed(run_folder, clips)
    kept = sorted((run_folder / "features").iterdir())
    monkeypatch.setattr("jepa.evaluation._write_features", None)
    # Other labels are not other features.
    write(clips / "test.txt", [(f"v{n}.gif", 1 - n % 2) for n in range(8, 12)])
    assert probed(run_folder, clips)[1] == 0.0
    assert sorted((run_folder / "features").iterdir()) == kept


@pytest.mark.parametrize(
    "damage", [lambda b: b[:50], lambda b: b[: len(b) // 2], lambda b: b"x" + b]
)
def test_damaged_features_are_computed_anew(run_folder, clips, caplog, damage):
    probed(run_folder, clips)
    before = set((run_folder / "features").iterdir())
    write(clips / "train.txt", [(f"v{n}.gif", n % 2) for n in range(6)])
    probed(run_folder, clips)
    (added,) = set((run_folder / "features").iterdir()) - before or before
    whole = added.read_bytes()
    added.write_bytes(damage(whole))
    assert probed(run_folder, clips)[1] == 1.0
    assert "computing features anew" in caplog.text
    assert added.read_bytes() == whole


def test_a_clip_that_cannot_be_read_is_left_out_by_name(run_folder, clips, caplog):
    write(clips / "test.txt", [("v8.gif", 0), ("bad.gif", 1), ("v10.gif", 0)])
    report, top1 = probed(run_folder, clips, pixels=True)
    assert (report["test_clips"], report["train_clips"], top1) == (2, 8, 1.0)
    assert report["results"]["linear"]["pixels"]["questions"]["class"]["top1"] == 1.0
    assert "left out 1 of 3 clips of test that could not be read" in caplog.text
    assert "bad.gif" in caplog.text
    # The same from what is kept.
    assert probed(run_folder, clips)[0]["test_clips"] == 2
    result = tuned(run_folder, clips)
    assert (result["test_clips"], result["test_clips_unreadable"]) == (2, 1)
    assert result["top1"] in (0.0, 0.5, 1.0)
    write(clips / "test.txt", [("bad.gif", 1)] * 3)
    with pytest.raises(ConfigError, match="clips that can be read, got none"):
        probed(run_folder, clips)
    with pytest.raises(ConfigError, match="clips that can be read, got none"):
        tuned(run_folder, clips)


def test_a_training_clip_that_cannot_be_read_is_left_out(run_folder, clips):
    write(clips / "train.txt", [("bad.gif", 1), *[(f"v{n}.gif", n % 2) for n in range(8)]])
    report, top1 = probed(run_folder, clips)
    assert (report["train_clips"], top1) == (8, 1.0)


def test_clips_without_a_label_are_left_out_and_counted(run_folder, clips, caplog):
    write(clips / "test.txt", [("v8.gif", 0), ("v9.gif", None), ("v10.gif", -1)])
    assert probed(run_folder, clips)[0]["test_clips"] == 1
    assert "left out 2 of 3 clips of test that have no label, among them" in caplog.text
    assert tuned(run_folder, clips)["test_clips"] == 1
    write(clips / "train.txt", [("v0.gif", 0), ("v1.gif", None), ("v3.gif", 1)])
    assert tuned(run_folder, clips)["train_clips"] == 2
    write(clips / "train.txt", [("v0.gif", None), ("v1.gif", None)])
    for evaluate in (probed, tuned):
        with pytest.raises(ConfigError, match="data must have labels, got none in train"):
            evaluate(run_folder, clips)


def test_a_label_that_training_lacks_is_refused(run_folder, clips):
    write(clips / "test.txt", [("v8.gif", 0), ("v9.gif", 7)])
    for evaluate in (probed, tuned):
        with pytest.raises(ConfigError, match=r"must be below 2, .* got 7 of .*v9\.gif"):
            evaluate(run_folder, clips)


def test_labelled_keeps_what_is_whole(clips):
    whole = pathlist(clips / "train.txt")
    assert labelled(whole) is whole
    write(clips / "train.txt", [("v0.gif", 0), ("v1.gif", None), ("v3.gif", 1)])
    part = labelled(pathlist(clips / "train.txt"))
    assert [part.label(index) for index in range(len(part))] == [0, 1]
    assert part.where(1).endswith("v3.gif")


def test_other_training_labels_start_a_fine_tuning_over(run_folder, clips, caplog):
    tuned(run_folder, clips)
    tuned(run_folder, clips)
    assert "resumed from step 4" in caplog.text
    caplog.clear()
    write(clips / "train.txt", [(f"v{n}.gif", 1 - n % 2) for n in range(8)])
    tuned(run_folder, clips)
    assert "starting over" in caplog.text and "the training clips and labels" in caplog.text
    caplog.clear()
    (clips / "v0.gif").write_bytes((clips / "v2.gif").read_bytes())
    tuned(run_folder, clips)
    assert "starting over" in caplog.text


def encoded(run_folder, source, out, **changes):
    return encode.run(encode.EncodeConfig(source, out, run=run_folder, threads=1, **changes))


def test_encode_gives_every_file_an_output_of_its_own(run_folder, clips, tmp_path):
    inner = tmp_path / "in"
    inner.mkdir()
    (inner / "v0.gif").write_bytes((clips / "v1.gif").read_bytes())
    (inner / "list.txt").write_text("v0.gif\n../v0.gif\n../v0.gif\n")
    out = tmp_path / "out"
    assert encoded(run_folder, inner / "list.txt", out) == (2, 0)
    first, second = sorted(out.glob("*.safetensors"))
    assert not torch.equal(load_file(first)["features"], load_file(second)["features"])
    assert encoded(run_folder, inner / "list.txt", out) == (0, 0)


def test_encode_skips_only_what_is_the_same(run_folder, clips, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "a.gif").write_bytes((clips / "v0.gif").read_bytes())
    target = out / "a.gif.safetensors"
    assert encoded(run_folder, source, out) == (1, 0)
    assert encoded(run_folder, source, out) == (0, 0)
    before = load_file(target)["features"]
    for changes in (dict(height=32, width=32), dict(levels="all"), dict(half=False), {}):
        assert encoded(run_folder, source, out, **changes) == (1, 0)
    assert torch.equal(load_file(target)["features"], before)
    (source / "a.gif").write_bytes((clips / "v1.gif").read_bytes())
    assert encoded(run_folder, source, out) == (1, 0)
    assert not torch.equal(load_file(target)["features"], before)
    target.write_bytes(target.read_bytes()[:40])
    assert encoded(run_folder, source, out) == (1, 0)


def test_encode_takes_one_file_and_counts_what_it_ignores(run_folder, clips, tmp_path, caplog):
    assert encoded(run_folder, clips / "v0.gif", tmp_path / "one") == (1, 0)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "a.gif").write_bytes((clips / "v0.gif").read_bytes())
    for end in ("webp", "tif"):
        Image.new("RGB", (64, 64)).save(mixed / f"b.{end}")
    (mixed / "notes.txt").write_text("no video")
    (mixed / "README").write_text("no video")
    assert encoded(run_folder, mixed, tmp_path / "out") == (3, 0)
    assert "ignored 2 files of other kinds" in caplog.text and "1 .txt, 1 none" in caplog.text
    with pytest.raises(ConfigError, match="must be text, got a file of bytes"):
        (mixed / "video.bin").write_bytes(b"\0\1" * 50)
        encoded(run_folder, mixed / "video.bin", tmp_path / "out")
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".safetensors", ""}


def test_encode_reads_names_of_any_bytes(run_folder, clips, tmp_path):
    name = os.fsdecode(b"Caf\xe9.gif")
    (clips / name).write_bytes((clips / "v0.gif").read_bytes())
    (clips / "list.txt").write_bytes(b"Caf\xe9.gif 1\n")
    assert encoded(run_folder, clips / "list.txt", tmp_path / "out") == (1, 0)
    target = tmp_path / "out" / "Caf\\udce9.gif.safetensors"
    assert load_file(target)["features"].isfinite().all()
    assert encoded(run_folder, clips / "list.txt", tmp_path / "out") == (0, 0)


def test_results_are_json(run_folder, clips):
    probed(run_folder, clips)
    assert json.loads((clips / "probe.json").read_text())["test_clips"] == 4
