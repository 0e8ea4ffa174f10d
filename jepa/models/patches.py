"""The token grid of clips, and what is read of the pixels of every token."""

from __future__ import annotations

import torch
from torch import Tensor

# Channel statistics of ImageNet, the ones V-JEPA code normalises with.
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)


def clip_grid(clips: Tensor, tubelet_size: int, patch_size: int) -> tuple[int, int, int]:
    """The (T, H, W) token grid of a batch of clips; one frame is an image, T = 1.

    Args:
        clips: uint8 [B, frames, H, W, 3] or float [B, 3, frames, H, W].

    Raises:
        ValueError: another layout, or sizes that patches do not divide.
    """
    _check_layout(clips)
    frames, height, width = _extent(clips)
    depth = 1 if frames == 1 else tubelet_size
    if frames % depth or height % patch_size or width % patch_size:
        raise ValueError(
            f"clip_grid: clips must have a multiple of {depth} frames and sides that are "
            f"multiples of {patch_size}, "
            f"got {frames} frames of {height} x {width}."
        )
    return frames // depth, height // patch_size, width // patch_size


def is_image(clips: Tensor) -> bool:
    """Whether the clips have a single frame."""
    return _extent(clips)[0] == 1


def patch_means(clips: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """Mean normalised colour of every token, [B*N, 3].

    Args:
        clips: uint8 [B, frames, H, W, 3] (normalised here) or float [B, 3, frames, H, W] (taken as
            normalised).
        tubelet_size, patch_size: frames and pixels of a tubelet; one frame is an image.
    """
    view = _tubelet_view(clips, clip_grid(clips, tubelet_size, patch_size), patch_size)
    if clips.dtype != torch.uint8:
        return view.mean((5, 6, 7)).flatten(0, 3)
    mean, std = _statistics(clips.device)
    return ((view.to(torch.float32).mean((5, 6, 7)) - mean) / std).flatten(0, 3)


def _tubelet_view(clips: Tensor, grid: tuple[int, int, int], patch_size: int) -> Tensor:
    """A strided view [B, T, H, W, 3, frames, rows, columns]; nothing is copied."""
    steps, height, width = grid
    if clips.dtype == torch.uint8:
        view = clips.view(clips.shape[0], steps, -1, height, patch_size, width, patch_size, 3)
        return view.permute(0, 1, 3, 5, 7, 2, 4, 6)
    view = clips.view(clips.shape[0], 3, steps, -1, height, patch_size, width, patch_size)
    return view.permute(0, 2, 4, 6, 1, 3, 5, 7)


def _check_layout(clips: Tensor) -> None:
    channel_axis = 4 if clips.dtype == torch.uint8 else 1
    if clips.ndim != 5 or clips.shape[channel_axis] != 3:
        raise ValueError(
            "clip_grid: clips must be uint8 [B, frames, H, W, 3] or float [B, 3, frames, H, W], "
            f"got {clips.dtype} {list(clips.shape)}."
        )


def _extent(clips: Tensor) -> tuple[int, int, int]:
    first = 1 if clips.dtype == torch.uint8 else 2
    return clips.shape[first], clips.shape[first + 1], clips.shape[first + 2]


def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std on the 0..255 scale."""
    # Filled on the device: torch.tensor(list, device="cuda") would copy from pageable memory and
    # wait for it.
    mean, std = torch.empty(3, device=device), torch.empty(3, device=device)
    for channel in range(3):
        mean[channel].fill_(255.0 * CHANNEL_MEAN[channel])
        std[channel].fill_(255.0 * CHANNEL_STD[channel])
    return mean, std
