"""Hugging Face transformers, I-JEPA: plain self-attention (positions are learned embeddings)."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.masked_attention import masked_attention
from .replace import CodeBase, Target, dropout_obstacles, weights_obstacles


def _forward(self: nn.Module, hidden_states: Tensor, attention_mask: None = None, **kwargs):
    layers = (self.q_proj, self.k_proj, self.v_proj)
    query, key, value = (
        layer(hidden_states).unflatten(-1, (-1, self.head_dim)) for layer in layers
    )
    return self.o_proj(masked_attention(query, key, value, scale=self.scaling).flatten(-2)), None


def _keeps(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs,
) -> bool:
    return attention_mask is not None or output_attentions


def _forward_self(
    self: nn.Module, hidden_states: Tensor, head_mask: None = None, output_attentions: bool = False
):
    """The class of releases before 5: projections named query, key, value; the output projection is
    a module of its own."""
    layers = (self.query, self.key, self.value)
    query, key, value = (
        layer(hidden_states).unflatten(-1, (self.num_attention_heads, -1)) for layer in layers
    )
    return masked_attention(query, key, value, scale=self.scaling).flatten(-2), None


def _keeps_self(
    self: nn.Module,
    hidden_states: Tensor,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> bool:
    return head_mask is not None or output_attentions


def _obstacles(module: nn.Module) -> list[str]:
    return dropout_obstacles(
        module, attention_probs_dropout_prob=module.attention_dropout
    ) + weights_obstacles(module)


def _obstacles_self(module: nn.Module) -> list[str]:
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
