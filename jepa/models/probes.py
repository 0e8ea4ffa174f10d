"""The modules of a probe: what pools, whitens and answers on top of frozen features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from jepa.config import ConfigError
from jepa.models.blocks import Mlp, initialise
from jepa_kernels.nn import CrossAttention

# Standard deviations below this share of the largest are noise of the arithmetic.
_WHITENING_FLOOR = 1e-4


class AttentivePooler(nn.Module):
    """The published pooler with a query per question: q + cross-attention(q, norm(x)), then q +
    mlp(norm(q)). [B, N, D] -> [B, Q, D]."""

    def __init__(self, width: int, heads: int, questions: int = 1) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, questions, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.xattn = CrossAttention(width, heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width)
        self.apply(initialise)
        nn.init.trunc_normal_(self.query_tokens, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query_tokens.expand(len(tokens), -1, -1)
        query = query + self.xattn(query, self.norm1(tokens))
        pooled: Tensor = query + self.mlp(self.norm2(query))
        return pooled


class Whitening(nn.Module):
    """Mean 0 and unit variance in every direction of the features it was fitted to: [B, D] -> [B,
    D]. In float64, since what is small before may be large after."""

    centre: Tensor
    directions: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("directions", torch.eye(width, dtype=torch.float64))

    def fit(self, features: Tensor) -> None:
        wide = features.double()
        std, mean = torch.std_mean(wide, dim=0, correction=0)
        scale = 1.0 / (std + 1e-6)
        _, values, vectors = torch.linalg.svd((wide - mean) * scale, full_matrices=False)
        spread = values / len(wide) ** 0.5
        spread = spread + _WHITENING_FLOOR * spread.max().clamp(min=1e-12)
        self.centre.copy_(mean)
        # With fewer clips than dimensions there are fewer directions.
        self.directions.zero_()
        self.directions[:, : len(values)] = scale[:, None] * vectors.T / spread

    def forward(self, features: Tensor) -> Tensor:
        return ((features.double() - self.centre) @ self.directions).float()


class Probe(nn.Module):
    """Logits of every question from the tokens of a clip: [B, N, D] -> one [B, classes] each."""

    def __init__(self, kind: str, width: int, heads: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        if kind == "attentive" and width % heads:
            raise ConfigError(f"config: heads must divide the feature width {width}, got {heads}.")
        self.pooler = AttentivePooler(width, heads, len(classes)) if kind == "attentive" else None
        self.whitening = Whitening(width) if kind == "linear" else None
        self.classes = dict(classes)
        # One layer for all questions, row by row: small products cost their launches.
        self.linear = nn.Linear(width, sum(classes.values()))
        initialise(self.linear)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        counts = list(self.classes.values())
        if self.whitening is not None:
            logits = self.linear(self.whitening(tokens.mean(1))).split(counts, dim=1)
            return dict(zip(self.classes, logits))
        assert self.pooler is not None
        own = zip(self.linear.weight.split(counts), self.linear.bias.split(counts))
        pooled = self.pooler(tokens).unbind(1)
        return {
            name: functional.linear(one, weight, bias)
            for name, one, (weight, bias) in zip(self.classes, pooled, own)
        }
