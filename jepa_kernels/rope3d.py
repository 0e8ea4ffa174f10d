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
        interpolate_from: grid side g0 of the pre-training resolution, or None. With it rows are
            scaled by (g0 - 1) / (H - 1) and columns by (g0 - 1) / (W - 1), so that other
            resolutions span the same angles; time is never scaled.

    Raises:
        TypeError, ValueError: a wrong kind or value, in one sentence.
    """

    grid: tuple[int, int, int]
    layout: RopeLayout = "interleaved"
    interpolate_from: int | None = None

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

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

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
        key = (self.grid, self.layout, self.interpolate_from, head_dim, device)
        kept: torch.Tensor = _tables.get(key, device, lambda: self._lasting(head_dim, device))[0]
        return kept

    def _lasting(self, head_dim: int, device: torch.device) -> tuple[torch.Tensor]:
        # Whatever mode the first call is in, later ones may be in another.
        with torch.inference_mode(False), torch.no_grad():
            return (self._build(head_dim, device),)

    def _build(self, head_dim: int, device: torch.device) -> torch.Tensor:
        m = rope_dim(head_dim)
        # float64 where the device has it: the angle of a late position loses digits in float32.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        positions = []
        for axis, size in enumerate(self.grid):
            position = torch.arange(size, device=device, dtype=dtype)
            if axis > 0 and self.interpolate_from is not None:
                position = position * (
                    (self.interpolate_from - 1) / (size - 1) if size > 1 else 0.0
                )
            positions.append(position)
        channel = torch.arange(m, device=device)
        frequency = channel // 2 if self.layout == "interleaved" else channel % max(m // 2, 1)
        omega = torch.exp(frequency.to(dtype) * (-2.0 * math.log(_BASE) / max(m, 1)))
        angle = torch.cat(positions)[:, None] * omega[None, :]
        return torch.stack((angle.cos(), angle.sin())).to(torch.float32)
