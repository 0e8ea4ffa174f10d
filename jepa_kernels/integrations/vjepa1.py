"""V-JEPA 1 as packaged in vjepa: attention without RoPE (positions are added sine embeddings)."""

from __future__ import annotations

from torch import Tensor

from ..ops.masked_attention import masked_attention
from .replace import CodeBase, Foreign, Target, dropout_obstacles
from .vjepa2 import cross_forward, no_obstacles


def _forward(self: Foreign, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
    query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
    scale = None if self.use_sdpa else float(self.scale)
    return self.proj(masked_attention(query, key, value, scale=scale).flatten(-2)), None


def _cross_forward(self: Foreign, q: Tensor, x: Tensor) -> Tensor:
    """Unlike V-JEPA 2's, the class has an output projection."""
    out: Tensor = self.proj(cross_forward(self, q, x))
    return out


def _obstacles(module: Foreign) -> list[str]:
    return dropout_obstacles(module, attn_drop=module.attn_drop.p, proj_drop=module.proj_drop_prob)


_PATH = "vjepa.models.utils.modules"
BASE = CodeBase(
    "vjepa1",
    "facebookresearch/jepa, vjepa",
    (
        Target((f"{_PATH}:Attention",), _forward, _obstacles, "attention"),
        Target((f"{_PATH}:CrossAttention",), _cross_forward, no_obstacles, "cross-attention"),
    ),
)
