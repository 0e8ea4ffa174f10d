"""Hugging Face transformers, VJEPA2: encoder and predictor attention (layout `tiled`), and the attentive pooler of the classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.masked_attention import masked_attention
from ..rope3d import Rope3D
from .replace import CodeBase, Target, dropout_obstacles

# Frames (in tubelets) that ids of a masked call may reach: the model extrapolates beyond the length it is configured for.
_FRAMES = 256


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _rope_forward(
    self: nn.Module,
    hidden_states: Tensor,
    position_mask: Tensor | None = None,
    output_attentions: bool = False,
    head_mask: None = None,
):
    _refuse(output_attentions=output_attentions, head_mask=head_mask)
    heads, side = self.num_attention_heads, self.grid_size
    query, key, value = (_heads(layer(hidden_states), heads) for layer in (self.query, self.key, self.value))
    tokens = hidden_states.shape[1]
    if position_mask is None:
        ids, frames = torch.arange(tokens, device=hidden_states.device), -(-tokens // (side * side))
    else:
        ids, frames = position_mask, max(_FRAMES, self.grid_depth)
    rope = Rope3D((frames, side, side), "tiled")
    out = masked_attention(query, key, value, query_ids=ids, rope=rope, scale=self.scaling)
    return self.proj(out.flatten(-2)), None


def _self_forward(self: nn.Module, hidden_states: Tensor, attention_mask: None = None, output_attentions: bool = False):
    _refuse(attention_mask=attention_mask, output_attentions=output_attentions)
    query, key, value = (_heads(layer(hidden_states), self.num_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
    return self.out_proj(masked_attention(query, key, value, scale=self.scale).flatten(-2)), None


def _cross_forward(
    self: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, attention_mask: None = None, output_attentions: bool = False
):
    _refuse(attention_mask=attention_mask, output_attentions=output_attentions)
    projected = ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
    query, key, value = (_heads(layer(x), self.num_heads) for layer, x in projected)
    return masked_attention(query, key, value, scale=self.scale).flatten(-2), None


def _refuse(**arguments: object) -> None:
    """Of what releases since 4.52 can pass, masks and attention probabilities are not part of the fused op."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(
                f"VJEPA2 attention: {name} must be None or False with the fused op. Undo it with restore(model) to use {name}."
            )


def _rope_obstacles(module: nn.Module) -> list[str]:
    return dropout_obstacles(module, attention_probs_dropout_prob=module.dropout_prob)


def _pooler_obstacles(module: nn.Module) -> list[str]:
    return dropout_obstacles(module, attention_dropout=module.dropout)


_PATH = "transformers.models.vjepa2.modeling_vjepa2"
BASE = CodeBase(
    "transformers-vjepa2",
    "transformers VJEPA2Model, VJEPA2ForVideoClassification",
    (
        Target((f"{_PATH}:VJEPA2RopeAttention",), _rope_forward, _rope_obstacles, "six rotations, concatenations and attention"),
        Target((f"{_PATH}:VJEPA2PoolerSelfAttention",), _self_forward, _pooler_obstacles, "attention"),
        Target((f"{_PATH}:VJEPA2PoolerCrossAttention",), _cross_forward, _pooler_obstacles, "cross-attention"),
    ),
)
