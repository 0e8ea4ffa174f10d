"""Views: which part of the picture a step sees, chosen on the host by counter-based numbers and cut
out on the device in one batch.

The loader only scales frames to a common canvas. A view is a box in shares of the canvas, which
stands for the same part of the source picture whatever its size, so the shape of the canvas does
not matter to the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from jepa.batch import LoadedBatch, Views
from jepa.counter_rng import Stream, stream_id, uniforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_ATTEMPTS = 10


@dataclass(frozen=True)
class ViewSpec:
    """Random resized crop to (height, width): a box of a random share of the picture and a random
    aspect ratio, maybe mirrored.

    `scale` = (1, 1) with a fixed `aspect_ratio` keeps the whole picture when the shapes agree;
    `flip` is a probability.
    """

    height: int = 224
    width: int = 224
    scale: tuple[float, float] = (0.3, 1.0)
    aspect_ratio: tuple[float, float] = (0.75, 1.35)
    flip: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(
                f"ViewSpec: height and width must be at least 1, got {self.height} and "
                f"{self.width}."
            )
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(f"ViewSpec: scale must be 0 < low <= high <= 1, got {self.scale}.")
        if not 0.0 < self.aspect_ratio[0] <= self.aspect_ratio[1]:
            raise ValueError(
                f"ViewSpec: aspect_ratio must be 0 < low <= high, got {self.aspect_ratio}."
            )
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"ViewSpec: flip must lie in [0, 1], got {self.flip}.")
        if min(self.std) <= 0:
            raise ValueError(f"ViewSpec: std must be positive, got {self.std}.")

    def canvas(self) -> tuple[int, int]:
        """(height, width) for the loader: an eighth larger than the view, and wide enough for a 4:3
        picture.

        The width is a whole number of 16 pixels, which scales a third faster than others. Where all
        videos have one size not much larger than this, that size is the better canvas: conversion
        without scaling costs a seventh.
        """
        return math.ceil(self.height * 8 / 7), 16 * math.ceil(self.width * 8 / 7 * 4 / 3 / 16)


def whole_views(batch_size: int) -> Views:
    """The whole canvas, not mirrored."""
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(batch_size, 1)
    return Views(boxes, torch.zeros(batch_size, dtype=torch.bool))


def centre_views(spec: ViewSpec, source_sizes: ArrayLike) -> Views:
    """The largest centred box of the view's aspect ratio: what evaluation uses. `source_sizes` is
    [B, 2] (height, width)."""
    sizes = np.asarray(source_sizes, dtype=np.float64)
    boxes = _centred(sizes, np.full(len(sizes), spec.height / spec.width))
    return Views(
        torch.from_numpy(boxes.astype(np.float32)), torch.zeros(len(sizes), dtype=torch.bool)
    )


def random_views(
    spec: ViewSpec,
    *,
    seed: int,
    step: int,
    samples: ArrayLike,
    source_sizes: ArrayLike,
    may_flip: ArrayLike | None = None,
) -> Views:
    """Boxes and flips of a batch, a function of the keys only.

    Args:
        spec: ranges of the crop.
        seed, step, samples: keys; `samples` [B] are places in the global batch.
        source_sizes: [B, 2] (height, width) of the pictures, for the aspect ratio.
        may_flip: [B], False where mirroring would change the label; None means all may be.

    A box that does not fit the picture is drawn again, ten times at most; then the largest centred
    one is taken, its aspect ratio clamped to the range.
    """
    sizes = np.asarray(source_sizes, dtype=np.float64)
    numbers = uniforms(
        seed, step, np.asarray(samples, dtype=np.int64), stream_id(Stream.VIEW), 2 * _ATTEMPTS + 4
    )
    shares, ratios = numbers[:, 4::2], numbers[:, 5::2]
    area = sizes.prod(axis=1, keepdims=True) * (
        spec.scale[0] + shares * (spec.scale[1] - spec.scale[0])
    )
    low, high = math.log(spec.aspect_ratio[0]), math.log(spec.aspect_ratio[1])
    # The range is width / height, as usual for crops (blocks of masks state height / width).
    ratio = np.exp(low + ratios * (high - low))
    height, width = np.sqrt(area / ratio), np.sqrt(area * ratio)
    slack = 1.0 + 1e-9
    fits = (height <= sizes[:, :1] * slack) & (width <= sizes[:, 1:] * slack)
    chosen = fits.argmax(axis=1)
    row = np.arange(len(sizes))
    size = np.minimum(np.stack([height[row, chosen], width[row, chosen]], axis=1) / sizes, 1.0)
    random = np.concatenate([numbers[:, :2] * (1.0 - size), size], axis=1)
    fallback = _centred(sizes, 1.0 / np.clip(sizes[:, 1] / sizes[:, 0], *spec.aspect_ratio))
    boxes = np.where(fits.any(axis=1)[:, None], random, fallback)
    flips = numbers[:, 2] < spec.flip
    if may_flip is not None:
        flips &= np.asarray(may_flip, dtype=np.bool_)
    return Views(torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(flips))


def _centred(sizes: NDArray[np.float64], ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest centred box with height / width = ratio, as shares (top, left, height, width)."""
    height = np.minimum(sizes[:, 0], sizes[:, 1] * ratio)
    share = np.stack([height / sizes[:, 0], height / ratio / sizes[:, 1]], axis=1)
    share = np.minimum(share, 1.0)
    return np.concatenate([(1.0 - share) / 2, share], axis=1)


def model_input(batch: LoadedBatch, spec: ViewSpec) -> Tensor:
    """[B, 3, T, height, width] float32, normalised: cuts the batch's views out of its clips, on
    their device.

    A batch without views takes the whole canvas.
    """
    return cut_views(batch.clips, batch.views, spec)


def cut_views(clips: Tensor, views: Views | None, spec: ViewSpec) -> Tensor:
    """Crop, scale (bilinear, with antialiasing where it shrinks), flip and normalise as two batched
    matrix products.

    Args:
        clips: uint8 [B, T, Hc, Wc, 3].
        views: boxes [B, 4] (top, left, height, width) in shares of the canvas and flips [B], on the
            device of `clips`; None: whole canvas.
        spec: size, mean and std.

    Returns:
        [B, 3, T, height, width] float32, also under autocast. Deterministic; no value is read back
        to the host.
    """
    if clips.dtype != torch.uint8 or clips.dim() != 5 or clips.shape[4] != 3:
        raise ValueError(
            f"cut_views: clips must be uint8 [B, T, H, W, 3], got {clips.dtype} "
            f"{list(clips.shape)}."
        )
    with torch.autocast(clips.device.type, enabled=False):
        gain, shift = _affine(spec.mean, spec.std, clips.device)
        frames, height, width = clips.shape[1:4]
        if views is None and (height, width) == (spec.height, spec.width):
            pixels = clips.permute(0, 4, 1, 2, 3).float()
        else:
            views = views if views is not None else whole_views(len(clips)).to(clips.device)
            down = _resampling(
                views.boxes[:, 0] * height, views.boxes[:, 2] * height, height, spec.height
            )
            across = _resampling(
                views.boxes[:, 1] * width, views.boxes[:, 3] * width, width, spec.width
            )
            across = torch.where(views.flips[:, None, None], across.flip(1), across)
            # One product per sample each: [h, Hc] x [Hc, T*Wc*3], then [3*T*h, Wc] x [Wc, w].
            rows = torch.bmm(down, clips.permute(0, 2, 1, 3, 4).float().flatten(2))
            rows = (
                rows.view(len(clips), spec.height, frames, width, 3)
                .permute(0, 4, 2, 1, 3)
                .reshape(len(clips), -1, width)
            )
            pixels = torch.bmm(rows, across.transpose(1, 2)).view(
                len(clips), 3, frames, spec.height, spec.width
            )
        return torch.addcmul(shift, pixels, gain)


@lru_cache(maxsize=16)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Gain and shift of byte -> normalised, kept per device so that a step copies nothing."""
    gain = torch.tensor([1.0 / (255.0 * s) for s in std], device=device).view(1, 3, 1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(
        1, 3, 1, 1, 1
    )
    return gain, shift


def _resampling(start: Tensor, extent: Tensor, pixels: int, outputs: int) -> Tensor:
    """[B, outputs, pixels] weights of a triangle filter as wide as an output pixel (at least a
    pixel), within [start, start+extent]."""
    scale = (extent / outputs)[:, None, None]
    centre = (
        start[:, None, None]
        + (torch.arange(outputs, device=start.device)[None, :, None] + 0.5) * scale
    )
    place = torch.arange(pixels, device=start.device, dtype=torch.float32)[None, None, :]
    weights = (1.0 - (place + 0.5 - centre).abs() / scale.clamp(min=1.0)).clamp(min=0.0)
    # A pixel belongs to the view if any of it does; a thousandth of a pixel forgives the rounding
    # of shares.
    first, last = (
        (start + 1e-3).floor()[:, None, None],
        (start + extent - 1e-3).ceil()[:, None, None],
    )
    weights = torch.where((place >= first) & (place < last), weights, torch.zeros_like(weights))
    return weights / weights.sum(dim=2, keepdim=True)
