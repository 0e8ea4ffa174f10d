"""Times of video tokens: who sees whom in `masked_attention`, as two integers a token.

A query sees a key iff ``query_time - window < key_time <= query_time``. With frames as times that
is the block-causal mask of V-JEPA 2-AC (arXiv 2506.09985, section 3.1): a token sees its own frame
and all earlier ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import sentence
from .rope3d import Rope3D


class FrameTokens(NamedTuple):
    """int64 ``[N]`` each; ``masked_attention(q, k, v, rope=rope, **tokens._asdict())`` takes them.

    Attributes:
        query_ids: where each token is rotated, -1 where it is not.
        query_times, key_times: its time when it reads, and when it is read.
    """

    query_ids: torch.Tensor
    query_times: torch.Tensor
    key_times: torch.Tensor


def frame_times(
    grid: tuple[int, int, int],
    ids: torch.Tensor | None = None,
    *,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The frame ``id // (H*W)`` of each token.

    Args:
        grid: (T, H, W) in tokens.
        ids: int32 or int64 token ids of any shape, such as those of the visible tokens; None is the
            whole grid in order.
        device: where to make the times of the whole grid.

    Returns:
        shaped like `ids` and in its dtype (the whole grid: int64 ``[T*H*W]``). A token without a
        position (id -1) gets time -1: every token of the grid sees it, and it sees only its like.

    Example:
        >>> frame_times((2, 1, 2)).tolist()
        [0, 0, 1, 1]
    """
    frames, height, width = Rope3D(grid).grid
    if ids is None:
        ids = torch.arange(frames * height * width, device=device)
    return torch.div(ids, height * width, rounding_mode="floor")


def frame_tokens(
    grid: tuple[int, int, int],
    *,
    conditioning: int = 0,
    class_tokens: int = 0,
    registers: int = 0,
    class_reads_itself: bool = False,
    device: torch.device | str | None = None,
) -> FrameTokens:
    """Ids and times of class tokens, then registers, then every frame: its conditioning tokens,
    then its patches.

    Args:
        grid: (T, H, W) in tokens.
        conditioning: action and state tokens ahead of the patches of each frame, as in V-JEPA 2-AC.
            They have the time of their frame and the id ``t*H*W`` of its first patch: position 0
            rotates nothing, so only time turns them.
        class_tokens: tokens that read every token of the clip and are read by none, so that they
            carry nothing from a late frame to an early one. Not rotated.
        registers: tokens that every token reads; they read one another alone, for the same reason.
            Not rotated. Under a window they are seen by the frames that it reaches from time -1.
        class_reads_itself: class tokens also read one another.
        device: where to make them.

    Returns:
        `FrameTokens` of ``class_tokens + registers + T * (conditioning + H*W)`` tokens.

    Raises:
        ValueError: a negative count.

    Example:
        >>> tokens = frame_tokens((2, 1, 1), conditioning=1, class_tokens=1)
        >>> tokens.query_ids.tolist()
        [-1, 0, 0, 1, 1]
        >>> tokens.query_times.tolist(), tokens.key_times.tolist()
        ([1, 0, 0, 1, 1], [2, 0, 0, 1, 1])
    """
    for argument, count in (
        ("conditioning", conditioning),
        ("class_tokens", class_tokens),
        ("registers", registers),
    ):
        if count < 0:
            raise ValueError(sentence("frame_tokens", argument, "be at least 0", count))
    frames, height, width = Rope3D(grid).grid
    spatial = height * width
    patches = torch.arange(frames * spatial, device=device).view(frames, spatial)
    of_frames = torch.cat((patches[:, :1].expand(-1, conditioning), patches), dim=1).flatten()
    times = frame_times(grid, of_frames)
    # Later than every other query, and as a key later than itself unless it is to read itself.
    class_time = frames if class_reads_itself else frames - 1
    ahead = [class_tokens, registers]
    return FrameTokens(
        _behind([-1, -1], ahead, of_frames),
        _behind([class_time, -1], ahead, times),
        _behind([frames, -1], ahead, times),
    )


def _behind(numbers: list[int], counts: list[int], rest: torch.Tensor) -> torch.Tensor:
    """`rest` behind each of `numbers`, so many times."""
    ahead = [rest.new_full((n,), number) for number, n in zip(numbers, counts, strict=True)]
    return torch.cat((*ahead, rest))
