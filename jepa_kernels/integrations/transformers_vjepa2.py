"""Hugging Face transformers, VJEPA2: encoder and predictor attention (layout `tiled`), and the
attentive pooler of the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.masked_attention import masked_attention
from ..rope3d import Rope3D
from .replace import CodeBase, Foreign, Target, dropout_obstacles, weights_obstacles

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutput

# Frames (in tubelets) that ids of a masked call may reach: the model extrapolates beyond the length
# it is configured for.
_FRAMES = 256


def _heads(x: Tensor, heads: int) -> Tensor:
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split


def _rope_forward(
    self: Foreign,
    hidden_states: Tensor,
    position_mask: Tensor | None = None,
    output_attentions: bool = False,
    head_mask: None = None,
) -> tuple[Tensor, None]:
    _refuse(output_attentions=output_attentions, head_mask=head_mask)
    heads, side = self.num_attention_heads, self.grid_size
    query, key, value = (
        _heads(layer(hidden_states), heads) for layer in (self.query, self.key, self.value)
    )
    tokens = hidden_states.shape[1]
    if position_mask is None:
        ids, frames = torch.arange(tokens, device=hidden_states.device), -(-tokens // (side * side))
    else:
        ids, frames = position_mask, max(_FRAMES, self.grid_depth)
    rope = Rope3D((frames, side, side), "tiled")
    out = masked_attention(query, key, value, query_ids=ids, rope=rope, scale=self.scaling)
    return self.proj(out.flatten(-2)), None


def _self_forward(
    self: Foreign,
    hidden_states: Tensor,
    attention_mask: None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, None]:
    _refuse(attention_mask=attention_mask, output_attentions=output_attentions)
    query, key, value = (
        _heads(layer(hidden_states), self.num_heads)
        for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    return self.out_proj(masked_attention(query, key, value, scale=self.scale).flatten(-2)), None


def _cross_forward(
    self: Foreign,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, None]:
    _refuse(attention_mask=attention_mask, output_attentions=output_attentions)
    projected = ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
    query, key, value = (_heads(layer(x), self.num_heads) for layer, x in projected)
    return masked_attention(query, key, value, scale=self.scale).flatten(-2), None


def encode_context(
    encoder: Foreign, pixel_values_videos: Tensor, context_mask: Sequence[Tensor]
) -> Tensor:
    """The encoder on the kept tokens alone, as V-JEPA trains it: **another function** than the
    model's own forward.

    The model's forward encodes every token and drops those outside `context_mask` afterwards, so
    its context tokens have seen the targets. Here they are dropped ahead of the first layer and see
    one another only; attention costs (kept / all) squared of it.

    Args:
        encoder: `VJEPA2Model.encoder`, accelerated or not.
        pixel_values_videos: [B, frames, channels, height, width].
        context_mask: M tensors [B, Nc] of token ids.

    Returns:
        [M * B, Nc, D] features, for `predict_targets`.
    """
    tokens = encoder.embeddings(pixel_values_videos)
    ids = torch.cat([mask.to(tokens.device) for mask in context_mask])
    tokens = _kept(tokens, context_mask)
    for layer in encoder.layer:
        tokens = layer(tokens, ids)[0]
    features: Tensor = encoder.layernorm(tokens)
    return features


def predict_targets(
    predictor: Foreign,
    context: Tensor,
    context_mask: Sequence[Tensor],
    target_mask: Sequence[Tensor],
    **kwargs: Any,
) -> Tensor:
    """The predictor on features of kept tokens, in the order they come in: what its forward
    computes, without sorting and unsorting.

    Args:
        predictor: `VJEPA2Model.predictor`, accelerated or not.
        context: [M * B, Nc, D] features of the context alone (`encode_context`, or the encoder's
            features at `context_mask`).
        context_mask, target_mask: M tensors [B, Nc] and [B, Nt] of token ids.
        kwargs: for the layers.

    Returns:
        [M * B, Nt, D] predictions.
    """
    embeddings = predictor.embeddings
    tokens = embeddings.predictor_embeddings(context)
    ids = torch.cat(
        [torch.cat(tuple(masks)).to(tokens.device) for masks in (context_mask, target_mask)], dim=1
    )
    token = embeddings.mask_tokens[1 % embeddings.num_mask_tokens]
    kept = tokens.shape[1]
    tokens = torch.cat(
        (tokens, token.expand(ids.shape[0], ids.shape[1] - kept, -1).to(tokens.dtype)), dim=1
    )
    for layer in predictor.layer:
        tokens = layer(tokens, ids, **kwargs)[0]
    # Every layer but attention treats tokens alone: what is not asked for is dropped ahead of norm
    # and projection.
    predicted: Tensor = predictor.proj(predictor.layernorm(tokens[:, kept:]))
    return predicted


def _kept(tokens: Tensor, masks: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [
            tokens.gather(1, mask.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[-1]))
            for mask in masks
        ]
    )


def _predictor_forward(
    self: Foreign,
    encoder_hidden_states: Tensor,
    context_mask: list[Tensor],
    target_mask: list[Tensor],
    head_mask: Sequence[None] | None = None,
    output_attentions: bool = False,
    output_hidden_states: bool = False,
    **kwargs: Any,
) -> BaseModelOutput:
    from transformers.modeling_outputs import BaseModelOutput

    # Release 4 passes a mask of heads for every layer, None where there is none.
    masked = head_mask is not None and any(mask is not None for mask in head_mask)
    _refuse(
        head_mask=masked,
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states,
    )
    context = _kept(encoder_hidden_states, context_mask)
    return BaseModelOutput(
        last_hidden_state=predict_targets(self, context, context_mask, target_mask, **kwargs)
    )


def _refuse(**arguments: object) -> None:
    """Of what releases since 4.52 can pass, masks and attention probabilities are not part of the
    fused op."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(
                f"VJEPA2: {name} must be None or False with the fused op. Undo it with "
                f"restore(model) to use {name}."
            )


def _rope_obstacles(module: Foreign) -> list[str]:
    return dropout_obstacles(
        module, attention_probs_dropout_prob=module.dropout_prob
    ) + weights_obstacles(module)


def _predictor_obstacles(module: Foreign) -> list[str]:
    """Whole layers take their own attention; only stochastic depth could tell tokens apart, and it
    draws per clip."""
    return []


def _pooler_obstacles(module: Foreign) -> list[str]:
    return dropout_obstacles(module, attention_dropout=module.dropout)


_PATH = "transformers.models.vjepa2.modeling_vjepa2"
BASE = CodeBase(
    "transformers-vjepa2",
    "transformers VJEPA2Model, VJEPA2ForVideoClassification",
    (
        Target(
            (f"{_PATH}:VJEPA2RopeAttention",),
            _rope_forward,
            _rope_obstacles,
            "six rotations, concatenations and attention",
        ),
        Target(
            (f"{_PATH}:VJEPA2PoolerSelfAttention",), _self_forward, _pooler_obstacles, "attention"
        ),
        Target(
            (f"{_PATH}:VJEPA2PoolerCrossAttention",),
            _cross_forward,
            _pooler_obstacles,
            "cross-attention",
        ),
        Target(
            (f"{_PATH}:VJEPA2Predictor",),
            _predictor_forward,
            _predictor_obstacles,
            "no sorting",
            option="unsorted_predictor",
        ),
    ),
)
