"""What probes, fine-tuning and `encode` share: the frozen encoder of a run, clips in order, and
features kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa.atomic import replacing, sweep
from jepa.checkpoint import Checkpoints, load_model, load_model_tensors
from jepa.config import ConfigError
from jepa.data.build import GENERATED
from jepa.data.clip import ClipDataset, ClipSpec
from jepa.data.decode import READER
from jepa.data.loader import Loader, LoaderConfig
from jepa.data.mixture import InOrder
from jepa.data.transforms import ViewSpec, model_input
from jepa.lock import exclusive
from jepa.models.encoder import Encoder, Levels
from jepa.pretrain import PretrainConfig, load_config
from jepa.step import ModelBundle

_log = logging.getLogger(__name__)
# What numpy raises for the header of a damaged file.
_DAMAGED = (
    *(ArithmeticError, EOFError, LookupError, MemoryError, OSError, SyntaxError, TokenError),
    *(TypeError, ValueError),
)

Which = Literal["newest", "best"] | int


@dataclass(frozen=True)
class InputSpec:
    """What an evaluation shows the encoder; `whole` takes frames as they are instead of their
    largest centred box."""

    frames: int
    stride: int
    fps: float | None
    height: int
    width: int
    whole: bool

    @classmethod
    def of(
        cls,
        cfg: PretrainConfig,
        kind: str,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> InputSpec:
        """The input of a run, with what is given in its place. Generated clips are shown whole."""
        trained = cfg.final_size
        size = (trained[0] if height is None else height, trained[1] if width is None else width)
        return cls(
            cfg.frames if frames is None else frames,
            cfg.stride,
            cfg.fps,
            *size,
            kind in GENERATED,
        )

    @property
    def views(self) -> ViewSpec:
        return ViewSpec(self.height, self.width, scale=(1.0, 1.0), flip=0.0)

    def batches(
        self, dataset: ClipDataset, batch_size: int, workers: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
        """(clips [B, 3, frames, height, width] float32, labels [B] int64, places in the data set
        [B]): every clip that can be read once, in order, its middle part, normalised on the
        device."""
        canvas = (self.height, self.width) if self.whole else self.views.canvas()
        config = LoaderConfig(
            batch_size=batch_size,
            clip=ClipSpec(self.frames, self.stride, self.fps, *canvas),
            views=None if self.whole else self.views,
            random=False,
            masks=None,
            workers=workers,
            pin_memory=device.type == "cuda",
            substitutes=False,
            max_bad_share=1.0,
        )
        picker = InOrder(dataset)
        for fetched in Loader(picker, config, 0, picker.steps(batch_size)):
            batch = fetched.batch.to(device, non_blocking=True)
            places = fetched.batch.sample_ids.numpy()
            yield model_input(batch, self.views), batch.labels, places


def checkpoint_folder(run: Path, which: Which = "newest") -> Path:
    """The checkpoint of a run that is asked for.

    Raises:
        ConfigError: the run has none, or not that one.
    """
    checkpoints = Checkpoints(run / "checkpoints")
    steps = checkpoints.steps()
    if not steps:
        raise ConfigError(
            "config: run must be the folder of a run with checkpoints (`jepa pretrain` makes "
            f"one), got {run}."
        )
    if which == "best":
        best = checkpoints.best()
        which = steps[-1] if best is None else best[0]
    step = steps[-1] if which == "newest" else which
    if step not in steps:
        raise ConfigError(
            f"config: checkpoint must be newest, best or one of {steps}, got {which}."
        )
    return checkpoints.path(step)


def load_bundle(run: Path, which: Which = "newest") -> tuple[ModelBundle, PretrainConfig, str]:
    """The networks of a run, its configuration, and a digest that names the weights."""
    cfg = load_config(run)
    tensors, state = load_model(checkpoint_folder(run, which))
    bundle = ModelBundle(cfg.model, cfg.variant)
    load_model_tensors(bundle, tensors)
    return bundle, cfg, state["sha256"]["model"]


def untrained_encoder(cfg: PretrainConfig, seed: int = 0) -> Encoder:
    """The same architecture at its random initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(cfg.model)


@torch.inference_mode()
def cached_features(
    encoder: Encoder,
    dataset: ClipDataset,
    spec: InputSpec,
    path: Path,
    *,
    levels: Levels = "last",
    batch_size: int = 16,
    workers: int = 0,
    device: torch.device | None = None,
) -> NDArray[np.float16]:
    """float16 [clips, N, D], mapped from `path`, which is computed once and appears whole or not at
    all. A clip that cannot be read is a row of NaN: see `readable`.

    Raises:
        ConfigError: no clip can be read.
        OSError: the file cannot be written.
    """
    # A second probe waits for the features instead of computing them too.
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.parent, name=f".{folder.name}.lock", wait=True):
        sweep(path.parent)
        known = _known_features(path, len(dataset))
        if known is not None:
            return known
        _write_features(encoder, dataset, spec, path, levels, batch_size, workers, device)
    table: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return table


def _known_features(path: Path, count: int) -> NDArray[np.float16] | None:
    """What is kept under `path`, None where that is nothing or damaged."""
    if not path.exists():
        return None
    try:
        table: NDArray[np.float16] = np.load(path, mmap_mode="r")
    except _DAMAGED as error:
        _log.warning("computing features anew, %s is damaged: %s", path, error)
        return None
    if table.dtype == np.float16 and table.ndim == 3 and len(table) == count:
        return table
    _log.warning("computing features anew, %s holds something else", path)
    return None


def _write_features(
    encoder: Encoder,
    dataset: ClipDataset,
    spec: InputSpec,
    path: Path,
    levels: Levels,
    batch_size: int,
    workers: int,
    device: torch.device | None,
) -> None:
    device = torch.device("cpu") if device is None else device
    encoder = encoder.to(device).eval()
    # Written in order, not mapped: a full disk is then an error and not a signal.
    with replacing(path) as scratch, open(scratch, "wb") as file:
        shape: tuple[int, ...] = ()
        done = 0
        for clips, _, places in spec.batches(dataset, batch_size, workers, device):
            features = encoder(clips, levels=levels).to("cpu", torch.float16).numpy()
            if not shape:
                shape = features.shape[1:]
                header = {"descr": "<f2", "fortran_order": False}
                np.lib.format.write_array_header_1_0(
                    file, {**header, "shape": (len(dataset), *shape)}
                )
            for place, row in zip(places.tolist(), features, strict=True):
                file.write(np.full((place - done, *shape), np.nan, np.float16).tobytes())
                file.write(row.tobytes())
                done = place + 1
        if not shape:
            raise ConfigError(
                f"config: data must have clips that can be read, got none of {len(dataset)} "
                f"in {dataset.name}."
            )
        file.write(np.full((len(dataset) - done, *shape), np.nan, np.float16).tobytes())


def readable(features: NDArray[np.floating], dataset: ClipDataset) -> NDArray[np.int64]:
    """Rows of `features` whose clip could be read; names the others."""
    suspects = np.flatnonzero(np.isnan(features[:, 0, 0]))
    bad = [int(row) for row in suspects if np.isnan(features[row]).all()]
    if bad:
        _log.warning(
            "left out %d of %d clips of %s that could not be read: %s",
            len(bad),
            len(dataset),
            dataset.name,
            ", ".join(dataset.where(row) for row in bad),
        )
    return np.setdiff1d(np.arange(len(features)), bad)


def content(dataset: ClipDataset, *, labels: bool = False) -> str:
    """A digest of what a data set holds: its samples in order, size and time of each file, and the
    labels on demand. Generated clips have no files; their configuration names them."""
    digest = hashlib.sha256(str(READER).encode())
    for index in range(len(dataset)):
        place = dataset.where(index)
        try:
            status = os.stat(place)
            version = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            version = "none"
        label = dataset.label(index) if labels else ""
        digest.update(f"{place}\0{version}\0{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def cache_key(*parts: object) -> str:
    """A short name for features: of the weights, the data and the input they came from."""
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:20]


def wilson(correct: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share = correct / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).float().mean())
