"""What probes, fine-tuning and `encode` share: the frozen encoder of a run, clips in order, and
features kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa.atomic import replacing
from jepa.checkpoint import Checkpoints, load_model, load_model_tensors
from jepa.config import ConfigError
from jepa.data.build import GENERATED
from jepa.data.clip import ClipDataset, ClipSpec
from jepa.data.loader import Loader, LoaderConfig
from jepa.data.mixture import InOrder
from jepa.data.transforms import ViewSpec, model_input
from jepa.models.encoder import Encoder, Levels
from jepa.pretrain import PretrainConfig, load_config
from jepa.step import ModelBundle

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
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(clips [B, 3, frames, height, width] float32, labels [B] int64): every clip once, in
        order, its middle part, normalised on the device."""
        canvas = (self.height, self.width) if self.whole else self.views.canvas()
        config = LoaderConfig(
            batch_size=batch_size,
            clip=ClipSpec(self.frames, self.stride, self.fps, *canvas),
            views=None if self.whole else self.views,
            random=False,
            masks=None,
            workers=workers,
            pin_memory=device.type == "cuda",
        )
        picker = InOrder(dataset)
        for fetched in Loader(picker, config, 0, picker.steps(batch_size)):
            batch = fetched.batch.to(device, non_blocking=True)
            yield model_input(batch, self.views), batch.labels


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
    """float16 [clips, N, D] of every clip, mapped from `path`, which is computed once and appears
    whole or not at all."""
    if not path.exists():
        device = torch.device("cpu") if device is None else device
        encoder = encoder.to(device).eval()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            table: NDArray[np.float16] | None = None
            done = 0
            for clips, _ in spec.batches(dataset, batch_size, workers, device):
                features = encoder(clips, levels=levels).to("cpu", torch.float16).numpy()
                if table is None:
                    table = np.lib.format.open_memmap(
                        scratch, "w+", np.float16, (len(dataset), *features.shape[1:])
                    )
                table[done : done + len(features)] = features
                done += len(features)
            if table is None:
                raise ValueError("cached_features: dataset must have clips, got none.")
            table.flush()
    return np.load(path, mmap_mode="r")


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
