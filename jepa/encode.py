"""`jepa encode`: features of a folder or list of videos, one safetensors file per video, in bounded
memory and without gradients."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from jepa import distributed
from jepa.atomic import UNFINISHED, replacing
from jepa.batch import Views
from jepa.config import ConfigError
from jepa.data.clip import BadClipError, ClipSpec
from jepa.data.decode import READER, read_image, read_video
from jepa.data.files import IMAGES, VIDEOS
from jepa.data.pathlist import pathlist
from jepa.data.transforms import centre_views, cut_views
from jepa.evaluation import InputSpec, Which, load_bundle
from jepa.lock import exclusive
from jepa.models.encoder import Levels

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeConfig:
    """What to encode and where to."""

    input: Path
    """A folder, searched through for videos and images; one of them; or a text file of paths."""
    output: Path
    """Folder; a/b.mp4 of the input becomes a/b.mp4.safetensors with features [clips, N, D]."""
    run: Path = Path("runs/pretrain")
    """Folder of the pre-training run whose encoder to use."""
    checkpoint: Which = "newest"
    """newest, best, or a step."""
    levels: Levels = "last"
    """The last level, or all levels side by side."""
    clips: int = 1
    """Clips per video, evenly spread."""
    frames: int | None = None
    """Frames of a clip; null: the run's."""
    stride: int | None = None
    """Frames of the video per frame of a clip; null: the run's."""
    fps: float | None = None
    """Frames per second of a clip; null: the run's."""
    height: int | None = None
    """Height in pixels; null: the run's."""
    width: int | None = None
    """Width in pixels; null: the run's."""
    half: bool = True
    """Store float16 instead of float32."""
    skip_existing: bool = True
    """Leave features alone that are of the same file, weights and settings."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ConfigError(f"config: clips must be at least 1, got {self.clips}.")


def found(source: Path) -> list[tuple[Path, Path]]:
    """(path, name under the output folder) of every file to encode, no name twice.

    Raises:
        ConfigError: nothing is there, or nothing that can be encoded.
    """
    suffixes = (*VIDEOS, *IMAGES)
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file())
        pairs = [(p, p.relative_to(source)) for p in files if p.suffix.lower() in suffixes]
        others = [p for p in files if p.suffix.lower() not in (*suffixes, ".safetensors")]
        ignored = Counter(p.suffix.lower() or "none" for p in others if p.name[0] != ".")
        if ignored:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
            _log.warning(
                "ignored %d files of other kinds in %s: %s", ignored.total(), source, kinds
            )
    elif source.suffix.lower() in suffixes and source.is_file():
        pairs = [(source, Path(source.name))]
    elif source.is_file():
        listed = pathlist(source)
        pairs = [(listed.root / name, _inside(name)) for name in listed.files]
    else:
        raise ConfigError(
            "config: input must be a folder, a video, an image or a list of files, got "
            f"{source}, where nothing is."
        )
    if not pairs:
        raise ConfigError(
            f"config: input must hold videos ({', '.join(VIDEOS)}) or images "
            f"({', '.join(IMAGES)}), got none in {source}."
        )
    return _distinct(pairs)


def _printable(path: Path) -> str:
    """A path as UTF-8; bytes of it that are not are written as escapes."""
    return str(path).encode(errors="backslashreplace").decode()


def _inside(name: str) -> Path:
    """A listed path as one below the output folder."""
    return Path(*(part for part in Path(name).parts if part not in ("/", "..")))


def _distinct(pairs: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """No file twice, and no name for two files."""
    owners: dict[Path, Path] = {}
    result = []
    for path, listed in dict(pairs).items():
        # safetensors opens UTF-8 names only.
        name = Path(_printable(listed))
        if owners.setdefault(name, path) != path:
            digest = hashlib.sha256(str(path).encode(errors="surrogateescape")).hexdigest()
            name = name.with_name(f"{name.stem}.{digest[:12]}{name.suffix}")
        result.append((path, name))
    return result


def _identity(path: Path, clip: ClipSpec, cfg: EncodeConfig, digest: str) -> str:
    """What the features of a file depend on."""
    try:
        status = path.stat()
        version = [status.st_size, status.st_mtime_ns]
    except OSError:
        version = []
    spec = [asdict(clip), cfg.levels, cfg.clips, cfg.half, READER]
    return json.dumps([digest, str(path), version, spec])


def _is_done(target: Path, identity: str) -> bool:
    try:
        with safe_open(target, "pt") as file:
            return (file.metadata() or {}).get("identity") == identity
    except (OSError, SafetensorError):
        return False


def run(cfg: EncodeConfig) -> tuple[int, int]:
    """Encodes every file; (number written, number that could not be read). One video is in memory
    at a time."""
    pairs = found(cfg.input)
    world = distributed.start(cfg.device)
    try:
        with exclusive(cfg.output) if world.leads else nullcontext():
            if world.leads:
                for entry in cfg.output.rglob(f"{UNFINISHED}*"):
                    entry.unlink()
            world.barrier()
            counts = _encode(cfg, pairs, world)
            world.barrier()
            return counts
    finally:
        distributed.stop(world)


@torch.inference_mode()
def _encode(
    cfg: EncodeConfig, pairs: list[tuple[Path, Path]], world: distributed.World
) -> tuple[int, int]:
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    bundle, trained_with, digest = load_bundle(cfg.run, cfg.checkpoint)
    encoder = bundle.evaluation_encoder.to(world.device).eval()
    spec = InputSpec.of(trained_with, "files", cfg.frames, cfg.height, cfg.width)
    stride = spec.stride if cfg.stride is None else cfg.stride
    clip = ClipSpec(
        spec.frames, stride, spec.fps if cfg.fps is None else cfg.fps, *spec.views.canvas()
    )
    written = bad = kept = 0
    for path, name in pairs[world.rank :: world.size]:
        target = cfg.output / f"{name}.safetensors"
        identity = _identity(path, clip, cfg, digest)
        if cfg.skip_existing and _is_done(target, identity):
            kept += 1
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
            metadata = {
                "weights": digest,
                "source": _printable(path),
                "grid": str(encoder.grid(cut[0])),
                "identity": identity,
            }
            # As bytes: `save_file` has a temporary file of its own, which a kill would leave.
            scratch.write_bytes(save({"features": features}, metadata))
        written += 1
    _log.info(
        "encoded %d files into %s; %d were there, %d could not be read",
        written,
        cfg.output,
        kept,
        bad,
    )
    return written, bad
