"""Block-causal masks of other code bases: recognised where they are dense, and a few numbers in
their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def tokens_per_frame(mask: Tensor) -> int | None:
    """The tokens of a frame if a mask ``[..., N, N]`` (True or 1 where a query sees a key) lets
    every token see its own frame and all earlier ones, and nothing else; otherwise None."""
    mask = mask.reshape(mask.shape[-2:]) != 0 if mask.numel() == mask.shape[-1] ** 2 else mask[:0]
    if not mask.numel():
        return None
    keys, count = torch.arange(mask.shape[1], device=mask.device), int(mask[0].sum())
    if count == 0 or mask.shape[0] % count:
        return None
    # Frame by frame: a second dense mask would take as much memory as this one.
    rows = mask.split(count)
    seen = all(bool((block == (keys < end * count)).all()) for end, block in enumerate(rows, 1))
    return count if seen else None


class FrameCausalMask:
    """Stands where code hands a dense block-causal mask around, and holds three numbers instead of
    N x N bools.

    It answers what predictors ask of their mask, the slice ``[:n, :n]`` and `to`. A torch function
    that is given one, such as the SDPA of a module that is not fused, gets the dense mask.

    Args:
        frames: of the context. per_frame: tokens of each, conditioning tokens included.
        length: the first tokens that it covers; None is all.
        device: where the dense mask is made.
    """

    def __init__(
        self,
        frames: int,
        per_frame: int,
        length: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.frames, self.per_frame, self.device = frames, per_frame, device
        self.length = frames * per_frame if length is None else length

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    def __getitem__(self, index: Any) -> FrameCausalMask | Tensor:
        rows, columns = index if isinstance(index, tuple) and len(index) == 2 else (index, None)
        if isinstance(rows, slice) and rows == columns == slice(rows.stop) and rows.stop >= 0:
            length = min(rows.stop, self.length)
            return FrameCausalMask(self.frames, self.per_frame, length, self.device)
        return self.dense()[index]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FrameCausalMask:
        return FrameCausalMask(self.frames, self.per_frame, self.length, device)

    def times(self, device: torch.device) -> Tensor:
        """The frame of each token, int64 ``[length]``."""
        tokens = torch.arange(self.length, device=device)
        return torch.div(tokens, self.per_frame, rounding_mode="floor")

    def dense(self) -> Tensor:
        """The mask that this one stands for, bool ``[length, length]``."""
        times = self.times(torch.device(self.device or "cpu"))
        return times[None, :] <= times[:, None]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Whatever torch computes with it is computed with the dense mask."""
        made = tree_map(
            lambda leaf: leaf.dense() if isinstance(leaf, cls) else leaf, (args, kwargs or {})
        )
        return function(*made[0], **made[1])


def stand_in(mask: Tensor | None) -> FrameCausalMask | None:
    """What may take the place of a dense mask ``[N, N]``; None where it must stay."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        return None
    per_frame = tokens_per_frame(mask)
    if per_frame is None:
        return None
    return FrameCausalMask(mask.shape[0] // per_frame, per_frame, device=mask.device)
