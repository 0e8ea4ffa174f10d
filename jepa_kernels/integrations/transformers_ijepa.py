"""Hugging Face transformers, I-JEPA: plain self-attention (positions are learned embeddings)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.masked_attention import masked_attention
from .replace import CodeBase, Foreign, Target, dropout_obstacles, weights_obstacles


def _forward(
    self: Foreign, hidden_states: Tensor, attention_mask: None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    layers = (self.q_proj, self.k_proj, self.v_proj)
    query, key, value = (
        layer(hidden_states).unflatten(-1, (-1, self.head_dim)) for layer in layers
    )
    return self.o_proj(masked_attention(query, key, value, scale=self.scaling).flatten(-2)), None


def _keeps(
    self: Foreign,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> bool:
    return attention_mask is not None or output_attentions


def _forward_self(
    self: Foreign, hidden_states: Tensor, head_mask: None = None, output_attentions: bool = False
) -> tuple[Tensor, None]:
    """The class of releases before 5: projections named query, key, value; the output projection is
    a module of its own."""
    layers = (self.query, self.key, self.value)
    query, key, value = (
        layer(hidden_states).unflatten(-1, (self.num_attention_heads, -1)) for layer in layers
    )
    return masked_attention(query, key, value, scale=self.scaling).flatten(-2), None


def _keeps_self(
    self: Foreign,
    hidden_states: Tensor,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> bool:
    return head_mask is not None or output_attentions


def _obstacles(module: Foreign) -> list[str]:
    return dropout_obstacles(
        module, attention_probs_dropout_prob=module.attention_dropout
    ) + weights_obstacles(module)


def _obstacles_self(module: Foreign) -> list[str]:
    return dropout_obstacles(module, attention_probs_dropout_prob=module.dropout_prob)


_PATH = "transformers.models.ijepa.modeling_ijepa"
BASE = CodeBase(
    "transformers-ijepa",
    "transformers IJepaModel, IJepaForImageClassification",
    (
        # Before release 5 a class of this name wraps the one below, and has no projections of its
        # own.
        Target(
            (f"{_PATH}:IJepaAttention",),
            _forward,
            _obstacles,
            "attention",
            marker="q_proj",
            keeps=_keeps,
        ),
        Target(
            (f"{_PATH}:IJepaSelfAttention",),
            _forward_self,
            _obstacles_self,
            "attention",
            keeps=_keeps_self,
        ),
    ),
)
