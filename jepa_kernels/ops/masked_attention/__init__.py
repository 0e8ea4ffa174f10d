"""masked_attention: attention over token ids, packed or dense, with 3-D RoPE fused."""

from .api import masked_attention

__all__ = ["masked_attention"]
