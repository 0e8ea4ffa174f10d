"""`jepa encode`: features of a folder or list of videos, one safetensors file per video, in bounded
memory and without gradients."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from jepa import distributed
from jepa.atomic import replacing
from jepa.batch import Views
from jepa.config import ConfigError
from jepa.data.clip import BadClipError, ClipSpec
from jepa.data.decode import read_image, read_video
from jepa.data.pathlist import pathlist
from jepa.data.transforms import centre_views, cut_views
from jepa.evaluation import InputSpec, Which, load_bundle
from jepa.models.encoder import Levels

_log = logging.getLogger(__name__)

VIDEOS = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True)
class EncodeConfig:
    """What to encode and where to.

    Args:
        input: a folder, searched through for videos and images, or a text file of paths (a label
            after a path is ignored).
        output: folder; `a/b.mp4` of the input becomes `a/b.mp4.safetensors` with `features` [clips,
            N, D].
        run, checkpoint: whose encoder. levels: ``last`` or ``all`` (side by side).
        clips: clips per video, evenly spread. frames, stride, fps, height, width: None for the
            run's.
        half: store float16. skip_existing: leave files alone that are there.
    """

    input: Path
    output: Path
    run: Path = Path("runs/pretrain")
    checkpoint: Which = "newest"
    levels: Levels = "last"
    clips: int = 1
    frames: int | None = None
    stride: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    half: bool = True
    skip_existing: bool = True
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ConfigError(f"config: clips must be at least 1, got {self.clips}.")


def found(source: Path) -> list[tuple[Path, Path]]:
    """(path, name under the output folder) of every file to encode.

    Raises:
        ConfigError: nothing is there, or nothing that can be encoded.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in VIDEOS + IMAGES)
        pairs = [(path, path.relative_to(source)) for path in files]
    elif source.is_file():
        listed = pathlist(source)
        pairs = [
            (
                listed.root / name,
                Path(*(part for part in Path(name).parts if part not in ("/", ".."))),
            )
            for name in listed.files
        ]
    else:
        raise ConfigError(
            f"config: input must be a folder or a list of files, got {source}, where nothing is."
        )
    if not pairs:
        raise ConfigError(
            f"config: input must hold videos ({', '.join(VIDEOS)}) or images "
            f"({', '.join(IMAGES)}), got none in {source}."
        )
    return pairs


@torch.inference_mode()
def run(cfg: EncodeConfig) -> tuple[int, int]:
    """Encodes every file; (number written, number that could not be read). One video is in memory
    at a time."""
    pairs = found(cfg.input)
    world = distributed.start(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    bundle, trained_with, digest = load_bundle(cfg.run, cfg.checkpoint)
    encoder = bundle.evaluation_encoder.to(world.device).eval()
    spec = InputSpec.of(trained_with, "files", cfg.frames, cfg.height, cfg.width)
    stride = spec.stride if cfg.stride is None else cfg.stride
    clip = ClipSpec(
        spec.frames, stride, spec.fps if cfg.fps is None else cfg.fps, *spec.views.canvas()
    )
    written = bad = 0
    for path, name in pairs[world.rank :: world.size]:
        target = cfg.output / f"{name}.safetensors"
        if cfg.skip_existing and target.exists():
            continue
        still = path.suffix.lower() in IMAGES
        draws = [0.5] if still else [(i + 0.5) / cfg.clips for i in range(cfg.clips)]
        try:
            read = [
                read_image(path, clip) if still else read_video(path, clip, draw) for draw in draws
            ]
        except BadClipError as error:
            bad += 1
            _log.warning("skipped a file that could not be read: %s", error)
            continue
        frames = torch.from_numpy(np.stack([one.frames for one in read])).to(world.device)
        views = centre_views(
            spec.views, [(one.source_height, one.source_width) for one in read]
        ).to(world.device)
        # One clip at a time, so that memory does not grow with `clips`.
        cut = [
            cut_views(
                frames[i : i + 1], Views(views.boxes[i : i + 1], views.flips[i : i + 1]), spec.views
            )
            for i in range(len(read))
        ]
        parts = [encoder(one, levels=cfg.levels) for one in cut]
        features = (
            torch.cat(parts).to("cpu", torch.float16 if cfg.half else torch.float32).contiguous()
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as scratch:
            save_file(
                {"features": features},
                scratch,
                {"weights": digest, "source": str(path), "grid": str(encoder.grid(cut[0]))},
            )
        written += 1
    _log.info("encoded %d files into %s; %d could not be read", written, cfg.output, bad)
    distributed.stop(world)
    return written, bad
