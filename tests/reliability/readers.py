"""Every reader of a user's files, a set of sound files for each, and what it may raise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from jepa import evaluation, logs
from jepa.checkpoint import CheckpointError, Checkpoints, _digest, load, load_model_tensors
from jepa.config import ConfigError, to_yaml
from jepa.config import load as load_config
from jepa.convert import ConversionError
from jepa.convert import read as read_weights
from jepa.convert import write as write_weights
from jepa.data.clip import BadClipError, ClipSpec, MissingDataError
from jepa.data.decode import read_image, read_video
from jepa.data.diving48 import diving48
from jepa.data.imagenet100 import imagenet100
from jepa.data.pathlist import pathlist
from jepa.data.ssv2 import ssv2
from jepa.data.ucf101 import ucf101
from jepa.encode import _is_done
from jepa.pretrain import PretrainConfig
from tests.jepa import numbered_videos
from tests.jepa.run_cases import tiny_run

# Anything else that a reader raises is a fault.
REFUSALS = (BadClipError, ConfigError, CheckpointError, ConversionError, MissingDataError)
_CLIP = ClipSpec(3, 2, None, 32, 32)


@dataclass(frozen=True)
class Reader:
    """`sound` writes good files into a folder and returns them; `read` reads one of them (damaged)
    with a number in [0, 1)."""

    sound: Callable[[Path], Sequence[Path]]
    read: Callable[[Path, float], object]


def _videos(folder: Path) -> list[Path]:
    names = (
        *("h264_closed.mp4", "h264_open.mkv", "h264_closed.ts", "h264_open.avi", "fragments.mp4"),
        *("hevc_closed.mp4", "vp8_plain.webm", "vp9_plain.webm", "av1.mp4", "mpeg2_b2.mpg"),
        *("mpeg4_b2.avi", "mpeg4_b0.mov", "mjpeg.avi", "loop.gif", "windows.wmv", "flash.flv"),
        *("varying_h264.mkv", "lossless.avi"),
    )
    for name in names:
        recipe = replace(numbered_videos.RECIPES[name], frames=24)
        recipe.write(folder / name)
    return [folder / name for name in names]


def _images(folder: Path) -> list[Path]:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    picture = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    made: dict[str, tuple[Image.Image, dict]] = {
        "a.png": (picture, {}),
        "palette.png": (picture.quantize(16), {}),
        "deep.png": (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), {}),
        "alpha.png": (picture.convert("RGBA"), {}),
        "a.jpg": (picture, {"exif": exif}),
        "progressive.jpg": (picture, {"progressive": True}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "a.bmp": (picture, {}),
        "palette.bmp": (picture.quantize(16), {}),
        "a.webp": (picture, {"exif": exif}),
        "a.gif": (picture.quantize(32), {}),
        "a.tif": (picture, {"compression": "tiff_lzw", "exif": exif}),
        "float.tif": (Image.fromarray(noise[..., 0] / np.float32(255)), {}),
        "a.tga": (picture, {}),
        "a.ppm": (picture, {}),
        "a.ico": (picture.resize((32, 32)), {}),
        "a.jp2": (picture, {}),
    }
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    return [folder / name for name in made]


def _lists(folder: Path) -> list[Path]:
    texts = {
        "list.txt": "".join(f"videos/a b{i}.mp4 {i % 3}\n" for i in range(12)),
        "list.csv": "path,label\n" + "".join(f'"x, {i}.avi",{i}\n' for i in range(9)),
        "ssv2.csv": "".join(f"{i};Holding something\n" for i in range(9)),
        "ssv2.json": json.dumps(
            [{"id": str(i), "template": "Holding [something]"} for i in range(5)]
        ),
        "labels.json": json.dumps({"Holding something": "0", "Moving left": "1"}),
        "diving48.json": json.dumps([{"vid_name": f"v{i}", "label": i} for i in range(5)]),
        "classInd.txt": "1 A\r\n2 B\r\n",
        "trainlist01.txt": "A/v_a.avi 1\r\nB/v_b.avi 2\r\n",
        "imagenet.txt": "n1 robin\nn2 wren\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("n1", "n2"):
        (folder / name).mkdir()
        (folder / name / "a.jpg").touch()
    return [folder / name for name in texts]


def _read_list(path: Path, number: float) -> object:
    sound = path.parent / "sound"
    name = path.name
    if name.startswith("list"):
        return pathlist(path)
    if name == "labels.json":
        return ssv2(sound, sound / "ssv2.csv", path)
    if name.startswith("ssv2"):
        return ssv2(sound, path, sound / "labels.json")
    if name == "diving48.json":
        return diving48(sound, path)
    if name == "imagenet.txt":
        return imagenet100(sound, path)
    if name == "trainlist01.txt":
        return ucf101(sound, sound, list_file=path)
    # The class index: in a folder of its own.
    folder = path.parent / "index"
    folder.mkdir(exist_ok=True)
    (folder / "classInd.txt").write_bytes(path.read_bytes())
    return ucf101(sound, folder, list_file=sound / "trainlist01.txt")


def _configurations(folder: Path) -> list[Path]:
    (folder / "whole.yaml").write_text(to_yaml(tiny_run(Path("runs/x"), name="fwm_hw_ld")))
    (folder / "short.yaml").write_text(
        "variant: fwm_hw_ld\nbatch_size: 4\nschedule: {total_steps: 10}\nresize: [[5, 64, 64]]\n"
    )
    return [folder / "whole.yaml", folder / "short.yaml"]


@lru_cache(maxsize=1)
def _tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(8, 8), "a.bias": torch.randn(8), "n": torch.tensor(3)}


def _checkpoints(folder: Path) -> list[Path]:
    Checkpoints(folder).save(7, _tensors(), {"rng/cpu": torch.get_rng_state()}, {"skipped": 0})
    return sorted((folder / "step_00000007").iterdir())


def _read_checkpoint(path: Path, number: float) -> object:
    """A checkpoint with one file damaged; half of the time its digest is that of the damage."""
    folder = path.parent / "step_00000007"
    folder.mkdir(exist_ok=True)
    sound = path.parent / "sound" / "step_00000007"
    for file in sound.iterdir():
        (folder / file.name).write_bytes((path if file.name == path.name else file).read_bytes())
    if path.suffix == ".safetensors" and number < 0.5:
        state = json.loads((folder / "state.json").read_text())
        state["sha256"][path.stem] = _digest(folder / path.name)
        (folder / "state.json").write_text(json.dumps(state))
    model, _, _ = load(folder)
    Checkpoints(path.parent).best()
    module = torch.nn.Module()
    module.a = torch.nn.Linear(8, 8)
    module.register_buffer("n", torch.tensor(3))
    load_model_tensors(module, model)
    return model


def _weights(folder: Path) -> list[Path]:
    parts = {part: {"a.weight": torch.ones(8, 8)} for part in ("encoder", "predictor")}
    torch.save({**parts, "epoch": 3}, folder / "a.pt")
    torch.save(parts, folder / "old.pth", _use_new_zipfile_serialization=False)
    write_weights(parts, folder / "whole")
    write_weights(parts, folder / "shards", shard_bytes=256)
    whole = (folder / "whole" / "model.safetensors").rename(folder / "a.safetensors")
    index = (folder / "shards" / "model.safetensors.index.json").rename(folder / "index.json")
    return [folder / "a.pt", folder / "old.pth", whole, index]


def _read_weights(path: Path, number: float) -> object:
    if path.suffix != ".json":
        return read_weights(path)
    # A damaged index, beside sound shards.
    shards = path.parent / "sound" / "shards"
    (shards / "model.safetensors.index.json").write_bytes(path.read_bytes())
    return read_weights(shards)


def _caches(folder: Path) -> list[Path]:
    np.save(folder / "features.npy", np.ones((6, 4, 8), np.float16))
    save_file({"features": torch.ones(2, 3)}, folder / "a.safetensors", {"identity": "x"})
    (folder / "log.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(9))
    )
    return [folder / name for name in ("features.npy", "a.safetensors", "log.jsonl")]


def _read_cache(path: Path, number: float) -> object:
    if path.suffix == ".npy":
        table = evaluation._known_features(path, 6)
        return None if table is None else float(np.asarray(table).sum(dtype=np.float64))
    if path.suffix == ".safetensors":
        return _is_done(path, "x")
    return logs._keep_until(path, int(10 * number))


READERS: dict[str, Reader] = {
    "videos": Reader(_videos, lambda path, number: read_video(path, _CLIP, number)),
    "images": Reader(_images, lambda path, _: read_image(path, _CLIP)),
    "lists": Reader(_lists, _read_list),
    "configurations": Reader(_configurations, lambda path, _: load_config(PretrainConfig, path)),
    "checkpoints": Reader(_checkpoints, _read_checkpoint),
    "weights": Reader(_weights, _read_weights),
    "caches": Reader(_caches, _read_cache),
}
# Of a hundred inputs, how many go to each; the costly ones are where most parsers are.
SHARES = {
    "videos": 28,
    "images": 28,
    "lists": 14,
    "configurations": 8,
    "checkpoints": 9,
    "weights": 6,
    "caches": 7,
}
