"""lightly's I-JEPA, in both of its flavours: blocks of torchvision's vision transformer, and
attention of timm's."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from ..ops.masked_attention import masked_attention
from .replace import CodeBase, Foreign, Target, dropout_obstacles


def _block_forward(self: Foreign, input: Tensor) -> Tensor:
    """torchvision's block: its attention is torch's own MultiheadAttention, which serves too many
    others to be replaced itself."""
    attention = self.self_attention
    projected = linear(self.ln_1(input), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = projected.unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
    x = input + self.dropout(attention.out_proj(masked_attention(query, key, value).flatten(-2)))
    out: Tensor = x + self.mlp(self.ln_2(x))
    return out


def _block_obstacles(module: Foreign) -> list[str]:
    attention = module.self_attention
    reasons = dropout_obstacles(module, attention_dropout=attention.dropout)
    if (
        not attention.batch_first
        or attention.in_proj_weight is None
        or attention.bias_k is not None
        or attention.add_zero_attn
    ):
        reasons.append(
            "self_attention must be as torchvision builds it (batch first, one projection, no "
            "added key)"
        )
    return reasons


def _attention_forward(
    self: Foreign, x: Tensor, attn_mask: None = None, is_causal: bool = False
) -> Tensor:
    if attn_mask is not None or is_causal:
        raise ValueError(
            "I-JEPA attention: attn_mask must be None and is_causal False with the fused op. Call "
            "restore(model) to use them."
        )
    query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
    attended = masked_attention(
        self.q_norm(query), self.k_norm(key), value, scale=float(self.scale)
    )
    out: Tensor = self.proj_drop(self.proj(attended.flatten(-2)))
    return out


def _attention_obstacles(module: Foreign) -> list[str]:
    reasons = dropout_obstacles(module, attn_drop=module.attn_drop.p)
    if getattr(module, "gate", None) is not None or not isinstance(
        getattr(module, "norm", nn.Identity()), nn.Identity
    ):
        reasons.append("a gate or a norm of the output is not part of the fused forward")
    return reasons


_TIMM = ("timm.layers.attention:Attention", "timm.models.vision_transformer:Attention")
BASE = CodeBase(
    "lightly-ijepa",
    "lightly IJEPABackbone, IJEPAPredictor, IJEPAPredictorTIMM, MaskedVisionTransformerTIMM",
    (
        Target(
            ("torchvision.models.vision_transformer:EncoderBlock",),
            _block_forward,
            _block_obstacles,
            "attention",
        ),
        Target(_TIMM, _attention_forward, _attention_obstacles, "attention"),
    ),
)
