"""Rotary positions of a (T, H, W) grid of video tokens: the two layouts in public use, by name.

A head of `head_dim` channels has ``m = 2 * floor(floor(head_dim / 3) / 2)`` channels for each of t,
y, x, in that order, and leaves the rest alone. Channel pair i of an axis is (2i, 2i + 1); the token
with id n sits at t = n // (H*W), y = (n // W) % H, x = n % W.

``interleaved``: both channels of pair i turn by ``position * 10000 ** (-2i / m)``: a rotation
(V-JEPA 2.1; RoFormer, arXiv 2104.09864). ``tiled``: channel c turns by the angle of frequency ``c
mod (m / 2)`` (V-JEPA 2 released weights). The two channels of a pair then turn by different angles,
so this is *not* a rotation: norms change and scores do not depend on relative position alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .checks import sentence, type_name
from .device_tables import DeviceTables

RopeLayout = Literal["interleaved", "tiled"]
LAYOUTS: tuple[str, ...] = ("interleaved", "tiled")
Interpolation = Literal["corners", "size"]
INTERPOLATIONS: tuple[str, ...] = ("corners", "size")
_BASE = 10000.0
_tables = DeviceTables(256)


def rope_dim(head_dim: int) -> int:
    """Channels that each of the three axes rotates; 0 where the head is too narrow for a pair per
    axis."""
    return 2 * ((head_dim // 3) // 2)


@dataclass(frozen=True)
class Rope3D:
    """How token ids become angles.

    Args:
        grid: (T, H, W) in tokens, each at least 1.
        layout: ``"interleaved"`` or ``"tiled"``; see the module text.
        interpolate_from: grid side g0 of the pre-training resolution, or None. With it rows and
            columns are scaled, so that other resolutions span the same angles; time is never
            scaled.
        interpolation: how rows are scaled, and columns likewise by W. ``"corners"``, V-JEPA 2.1's:
            by (g0 - 1) / (H - 1), which keeps the first and the last row where they were.
            ``"size"``, V-JEPA 2-AC's: by g0 / H, the ratio of the grids' sides.

    Raises:
        TypeError, ValueError: a wrong kind or value, in one sentence.
    """

    grid: tuple[int, int, int]
    layout: RopeLayout = "interleaved"
    interpolate_from: int | None = None
    interpolation: Interpolation = "corners"

    def __post_init__(self) -> None:
        grid = self.grid
        if not isinstance(grid, (tuple, list)) or len(grid) != 3:
            raise TypeError(sentence("Rope3D", "grid", "be three ints (T, H, W)", repr(grid)))
        for size in grid:
            if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
                raise TypeError(
                    sentence("Rope3D", "grid", "be three ints (T, H, W)", repr(tuple(grid)))
                )
            if size < 1:
                raise ValueError(
                    sentence("Rope3D", "grid", "have sizes of at least 1", tuple(grid))
                )
        if grid[0] * grid[1] * grid[2] > 2**31 - 1:
            raise ValueError(
                sentence("Rope3D", "grid", "have at most 2147483647 tokens", tuple(grid))
            )
        if isinstance(grid, list):
            object.__setattr__(self, "grid", tuple(grid))
        if self.layout not in LAYOUTS:
            raise ValueError(
                sentence("Rope3D", "layout", f"be one of {', '.join(LAYOUTS)}", repr(self.layout))
            )
        g0 = self.interpolate_from
        if g0 is not None and (isinstance(g0, bool) or not isinstance(g0, int)):
            raise TypeError(
                sentence("Rope3D", "interpolate_from", "be an int or None", type_name(g0))
            )
        if g0 is not None and g0 < 1:
            raise ValueError(sentence("Rope3D", "interpolate_from", "be at least 1", g0))
        if self.interpolation not in INTERPOLATIONS:
            wanted = f"be one of {', '.join(INTERPOLATIONS)}"
            raise ValueError(sentence("Rope3D", "interpolation", wanted, repr(self.interpolation)))

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def rotate(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """R(x, ids) as a tensor of its own, such as keys that are kept (`keys_rotated` of
        `masked_attention`).

        Args:
            x: ``[..., N, heads, head_dim]``, any float dtype; head_dim at least 6. Differentiated.
            ids: int32 or int64 ``[..., N]`` from -1 (not rotated) to the grid's last.

        Returns:
            shaped like `x`, in its dtype, computed in at least float32.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        table = self.table(x.shape[-1], x.device)
        return rotate(x.to(wide), ids, table, list(self.grid)).to(x.dtype)

    def table(self, head_dim: int, device: torch.device) -> torch.Tensor:
        """Cosines and sines of every axis position, float32 ``[2, T + H + W, m]``: a few KB, the
        same for every token and head.

        Rows are the T positions of t, then the H of y, then the W of x. Kernels compute
        ``out[2i] = x[2i] * cos[2i] - x[2i+1] * sin[2i]`` and ``out[2i+1] = x[2i+1] * cos[2i+1] +
        x[2i] * sin[2i+1]``, which serves both layouts.
        """
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return self._build(head_dim, device)
        # Plain values: the hash of a dataclass is computed in Python at every look-up.
        rule = (self.interpolate_from, self.interpolation)
        key = (self.grid, self.layout, *rule, head_dim, device)
        return _tables.get(key, device, lambda: self._lasting(head_dim, device))[0]

    def _lasting(self, head_dim: int, device: torch.device) -> tuple[torch.Tensor]:
        # Whatever mode the first call is in, later ones may be in another.
        with torch.inference_mode(False), torch.no_grad():
            return (self._build(head_dim, device),)

    def _scale_from(self, side: int, size: int) -> float:
        """What turns a row or column of `size` into one of the pre-training grid."""
        if self.interpolation == "size":
            return side / size
        return (side - 1) / (size - 1) if size > 1 else 0.0

    def _build(self, head_dim: int, device: torch.device) -> torch.Tensor:
        m = rope_dim(head_dim)
        # float64 where the device has it: the angle of a late position loses digits in float32.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        positions = []
        for axis, size in enumerate(self.grid):
            position = torch.arange(size, device=device, dtype=dtype)
            if axis > 0 and self.interpolate_from is not None:
                position = position * self._scale_from(self.interpolate_from, size)
            positions.append(position)
        channel = torch.arange(m, device=device)
        frequency = channel // 2 if self.layout == "interleaved" else channel % max(m // 2, 1)
        omega = torch.exp(frequency.to(dtype) * (-2.0 * math.log(_BASE) / max(m, 1)))
        angle = torch.cat(positions)[:, None] * omega[None, :]
        return torch.stack((angle.cos(), angle.sin())).to(torch.float32)


def rotate(
    x: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, grid: list[int]
) -> torch.Tensor:
    """R(x, ids) by the table of `Rope3D.table`, for ``[..., N, heads, head_dim]`` and ids ``[...,
    N]``."""
    cos, sin = _angles(ids, table, grid, x.dtype)
    head, tail = x.tensor_split((cos.shape[-1],), dim=-1)
    even, odd = head.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat(
        (head * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin, tail), dim=-1
    )


def rotate_transposed(
    grad: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, grid: list[int]
) -> torch.Tensor:
    """The gradient of `rotate`: the transpose, which is the inverse only for the interleaved
    layout."""
    cos, sin = _angles(ids, table, grid, grad.dtype)
    head, tail = grad.tensor_split((cos.shape[-1],), dim=-1)
    even, odd = (head * sin).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((head * cos + torch.stack((odd, -even), dim=-1).flatten(-2), tail), dim=-1)


def _angles(
    ids: torch.Tensor, table: torch.Tensor, grid: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every rotated channel of every token, ``[..., N, 1, 3 m]``; 1 and 0 where
    the id is -1."""
    frames, height, width = grid
    spatial = height * width
    place = ids.clamp(min=0).long()
    rows = (place // spatial, frames + place % spatial // width, frames + height + place % width)
    cos, sin = torch.cat([table[:, row] for row in rows], dim=-1).to(dtype)
    unrotated = (ids < 0)[..., None]
    return cos.masked_fill(unrotated, 1.0)[..., None, :], sin.masked_fill(unrotated, 0.0)[
        ..., None, :
    ]
