"""DINO-WM's predictor, in its repository and in jepa-wms: a frame-causal transformer with learned
positions, whose attention writes out its scores and masks them by a dense buffer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..ops.masked_attention import masked_attention
from .frame_causal import tokens_per_frame
from .replace import CodeBase, Foreign, Target

# Tokens of a frame by the mask that says so: counting them reads the mask, which waits for a GPU.
_per_frame: WeakIdKeyDictionary = WeakIdKeyDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _frame(module: Foreign) -> int | None:
    """The tokens of a frame by a module's mask ``[1, 1, N, N]``; None if it is of another kind."""
    mask = module.bias
    if mask not in _per_frame:
        _per_frame[mask] = tokens_per_frame(mask)
    count: int | None = _per_frame[mask]
    return count


def _forward(self: Foreign, x: Tensor) -> Tensor:
    query, key, value = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
    per_frame = _frame(self)
    times = torch.arange(x.shape[1], device=x.device).div(per_frame, rounding_mode="floor")
    attended = masked_attention(query, key, value, query_times=times, scale=float(self.scale))
    out: Tensor = self.to_out(attended.flatten(-2))
    return out


def _keeps(self: Foreign, x: Tensor) -> bool:
    """The original drops attention in training, and refuses more tokens than its mask covers."""
    drops = bool(self.training and self.dropout.p > 0)
    return drops or x.shape[1] > int(self.bias.shape[-1])


def _obstacles(module: Foreign) -> list[str]:
    if _frame(module) is None:
        return ["its mask must let every frame see itself and all earlier ones"]
    return []


BASE = CodeBase(
    "dino-wm",
    "gaoyuezhou/dino_wm, facebookresearch/jepa-wms",
    (
        Target(
            ("models.vit:Attention", "app.plan_common.models.vit:Attention"),
            _forward,
            _obstacles,
            "scores, mask, softmax and products",
            marker="to_qkv",
            keeps=_keeps,
        ),
    ),
)
