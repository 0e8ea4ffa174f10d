"""Parameter lists of the usual encoders, by name: what an optimizer and a teacher walk at every
step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TUBELET = 3 * 2 * 16 * 16  # values of one patch of two frames


@dataclass(frozen=True)
class Encoder:
    width: int
    depth: int


ENCODERS = {
    "micro": Encoder(64, 4),
    "vit_s": Encoder(384, 12),
    "vit_b": Encoder(768, 12),
    "vit_l": Encoder(1024, 24),
}


def shapes(name: str) -> list[tuple[int, ...]]:
    """Of every parameter, in the order of the module: patch embedding, blocks (norms, qkv,
    projection, MLP of four widths), final norm."""
    width, depth = ENCODERS[name].width, ENCODERS[name].depth
    block = [
        (width,),
        (width,),
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    return [(width, TUBELET), (width,), *block * depth, (width,), (width,)]


def draw(name: str, dtype: torch.dtype, device: str, scale: float = 0.02) -> list[torch.Tensor]:
    return [scale * torch.randn(shape, device=device).to(dtype) for shape in shapes(name)]


def count(name: str) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(name))


def threads() -> str:
    """Ending of a case name: one thread has no parallel region to start, so its numbers are a case
    of their own."""
    return "/1-thread" if torch.get_num_threads() == 1 else ""
