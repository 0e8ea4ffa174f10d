"""facebookresearch I-JEPA in its own repository layout: attention without RoPE that also returns
its probabilities."""

from __future__ import annotations

from torch import Tensor

from ..ops.masked_attention import masked_attention
from .replace import CodeBase, Foreign, Target, dropout_obstacles


def _forward(self: Foreign, x: Tensor) -> tuple[Tensor, None]:
    query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
    return self.proj(masked_attention(query, key, value, scale=float(self.scale)).flatten(-2)), None


def _obstacles(module: Foreign) -> list[str]:
    return dropout_obstacles(module, attn_drop=module.attn_drop.p, proj_drop=module.proj_drop.p)


BASE = CodeBase(
    "ijepa",
    "facebookresearch/ijepa",
    (Target(("src.models.vision_transformer:Attention",), _forward, _obstacles, "attention"),),
)
