"""facebookresearch V-JEPA 2.1 in its repository's layout: interleaved RoPE with interpolated
positions, a class token and registers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.masked_attention import masked_attention
from ..rope3d import Rope3D
from .replace import CodeBase, Foreign, Target
from .vjepa2 import FRAMES, cross_forward, no_obstacles, obstacles, qkv, scale, sides


def _rope_forward(
    self: Foreign,
    x: Tensor,
    mask: Tensor | None = None,
    T: int | None = None,
    H_patches: int | None = None,
    W_patches: int | None = None,
    return_attn: bool = False,
) -> tuple[Tensor, None]:
    if return_attn and not self.use_sdpa:
        raise ValueError(
            "V-JEPA 2.1: return_attn must be False with the fused op, got True. Call "
            "restore(model) to see probabilities."
        )
    height, width = sides(self, H_patches, W_patches)
    first, last = int(self.has_cls_first), self.n_registers
    if mask is None:
        mask = torch.arange(x.shape[1] - first - last, device=x.device)
        frames = -(-mask.shape[0] // (height * width))
    else:
        frames = FRAMES
    rope = Rope3D(
        (frames, height, width),
        "interleaved",
        self.pretrained_grid_size if self.interpolate_rope else None,
    )
    out = masked_attention(
        *qkv(self, x), query_ids=_with_unrotated(mask, first, last), rope=rope, scale=scale(self)
    )
    return self.proj(out.flatten(-2)), None


def _with_unrotated(ids: Tensor, first: int, last: int) -> Tensor:
    """Ids of every token: the class token ahead of the patches and the registers behind them have
    no position."""
    if first == last == 0:
        return ids
    lead = ids.shape[:-1]
    return torch.cat(
        (ids.new_full((*lead, first), -1), ids, ids.new_full((*lead, last), -1)), dim=-1
    )


def _plain_forward(self: Foreign, x: Tensor) -> Tensor:
    out: Tensor = self.proj(masked_attention(*qkv(self, x), scale=scale(self)).flatten(-2))
    return out


_PATH = "app.vjepa_2_1.models.utils.modules"
BASE = CodeBase(
    "vjepa2.1",
    "facebookresearch/vjepa2, app/vjepa_2_1",
    (
        Target(
            (f"{_PATH}:RoPEAttention",),
            _rope_forward,
            obstacles,
            "six rotations, concatenations and attention",
        ),
        Target((f"{_PATH}:Attention",), _plain_forward, obstacles, "attention"),
        Target((f"{_PATH}:CrossAttention",), cross_forward, no_obstacles, "cross-attention"),
    ),
)
