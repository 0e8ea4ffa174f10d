"""Attention the way public V-JEPA training code runs it: six eager rotations, two concatenations,
then SDPA.

This is a baseline, written to cost what that code costs: positions are repeated for every head,
frequencies, sines and cosines are recomputed in every block, and each of query and key is rotated
in three slices (time, row, column) that are then concatenated.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

PRETRAINED_SIDE = 16  # tokens per side the interpolated positions are stretched to


def rotate_slice(
    x: torch.Tensor, position: torch.Tensor, *, layout: str = "interleaved"
) -> torch.Tensor:
    """Rotate channel pairs of `x` [B, Nh, K, m] by position * 10000^(-2 i / m); `position` is [K]
    or [B, Nh, K]."""
    width = x.shape[-1]
    omega = 1.0 / 10000 ** (torch.arange(width // 2, dtype=x.dtype, device=x.device) / (width / 2))
    angle = position.unsqueeze(-1) * omega
    if layout == "interleaved":
        sine, cosine = (
            angle.sin().repeat_interleave(2, dim=-1),
            angle.cos().repeat_interleave(2, dim=-1),
        )
    else:
        repeats = [1] * (angle.dim() - 1) + [2]
        sine, cosine = angle.sin().repeat(repeats), angle.cos().repeat(repeats)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x * cosine + rotated * sine


def positions(
    ids: torch.Tensor, grid: tuple[int, int, int], *, interpolate: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Time, row and column of flat ids t * H * W + y * W + x."""
    _, height, width = grid
    plane = height * width
    time = ids // plane
    row = (ids - plane * time) // width
    column = (ids - plane * time) - width * row
    if interpolate:
        row = row * ((PRETRAINED_SIDE - 1) / max(1, height - 1))
        column = column * ((PRETRAINED_SIDE - 1) / max(1, width - 1))
    return time, row, column


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    ids: torch.Tensor | None,
    grid: tuple[int, int, int],
    *,
    interpolate: bool = True,
    layout: str = "interleaved",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated query and key, [B, Nh, K, Dh] each; `ids` [B, K], or None for every token of the grid
    in order."""
    heads, head_dim = query.shape[1], query.shape[-1]
    part = 2 * (head_dim // 3 // 2)
    if ids is None:
        ids = torch.arange(grid[0] * grid[1] * grid[2], device=query.device)
    else:
        ids = ids.unsqueeze(1).repeat(1, heads, 1)
    axes = positions(ids, grid, interpolate=interpolate)
    rotated = []
    for tensor in (query, key):
        slices = [
            rotate_slice(tensor[..., n * part : (n + 1) * part], axis, layout=layout)
            for n, axis in enumerate(axes)
        ]
        if 3 * part < head_dim:
            slices.append(tensor[..., 3 * part :])
        rotated.append(torch.cat(slices, dim=-1))
    return rotated[0], rotated[1]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ids: torch.Tensor | None,
    grid: tuple[int, int, int],
    *,
    interpolate: bool = True,
    layout: str = "interleaved",
) -> torch.Tensor:
    """Rotation, then SDPA: [B, Nh, K, Dh] in and out."""
    query, key = rotate(query, key, ids, grid, interpolate=interpolate, layout=layout)
    # Under autocast the rotation promotes to float32 while the value stays narrow.
    return F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)


class EagerRoPEAttention(nn.Module):
    """Self attention with a fused qkv projection: rows are all q, all k, all v, head-major."""

    def __init__(
        self, dim: int, heads: int, *, interpolate: bool = True, rope: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.interpolate, self.rope = heads, interpolate, rope
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: torch.Tensor, ids: torch.Tensor | None, grid: tuple[int, int, int]
    ) -> torch.Tensor:
        batch, tokens, dim = x.shape
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rope:
            out = attend(query, key, value, ids, grid, interpolate=self.interpolate)
        else:  # only to weigh the rotation: the same step without it
            out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))
