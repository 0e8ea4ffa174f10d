"""The pre-norm transformer block that encoder and predictor share, over packed or dense tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jepa_kernels
from jepa_kernels import Rope3D

LAYER_NORM_EPS = 1e-6
INITIAL_STD = 0.02
# Modality embeddings start all but absent.
EMBEDDING_STD = 1e-6


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens a call holds: their ids, where its sequences begin (None: dense [B, N]), the
    grid they sit on, and when they are (None: every token sees every other)."""

    ids: Tensor  # int64 [tokens] packed, or [N] dense
    cu_seqlens: Tensor | None
    rope: Rope3D
    times: Tensor | None = None  # shaped like ids; a token sees those of its time and before


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; rows of `qkv` are all queries, then all
    keys, then all values, by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend: str | None = None
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        mixed = jepa_kernels.masked_attention(
            query,
            key,
            value,
            query_ids=layout.ids,
            key_ids=layout.ids,
            rope=layout.rope,
            cu_seqlens_q=layout.cu_seqlens,
            cu_seqlens_k=layout.cu_seqlens,
            query_times=layout.times,
            backend=self.backend,
        )
        projected: Tensor = self.proj(mixed.flatten(-2))
        return projected


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return result


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        # Rounded, not cut: 1408 * 48 / 11 must be 6144 whatever the fraction rounds to.
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        x = x + self.attn(self.norm1(x), layout)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


def run_block(block: Block, x: Tensor, layout: TokenLayout, save_memory: bool) -> Tensor:
    """The block, recomputed in backward instead of stored where `save_memory`."""
    result: Tensor = (
        checkpoint(block, x, layout, use_reentrant=False)
        if save_memory and torch.is_grad_enabled()
        else block(x, layout)
    )
    return result


def initialise(module: nn.Module) -> None:
    """Truncated normal weights, zero biases, unit norms: for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def rescale_residuals(blocks: Iterable[Block]) -> None:
    """Divides what block i (from 1) adds to the residual stream by sqrt(2 i), so that depth does
    not inflate it at the start."""
    for i, block in enumerate(blocks, start=1):
        block.attn.proj.weight.div_(math.sqrt(2.0 * i))
        block.mlp.fc2.weight.div_(math.sqrt(2.0 * i))


def blocks_of(modules: nn.ModuleList) -> Iterator[Block]:
    """A list of blocks, as such: torch types what it holds as modules."""
    return cast(Iterator[Block], iter(modules))


def set_attention_backend(module: nn.Module, backend: str | None) -> None:
    """Forces an attention backend for every block below `module`; None leaves the choice to
    jepa_kernels."""
    for child in module.modules():
        if isinstance(child, Attention):
            child.backend = backend


PREFIXES = ("module.", "backbone.", "_orig_mod.")


def stripped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the prefixes that wrappers add removed: ``module.backbone.blocks.0..``
    becomes ``blocks.0..``."""
    result = {}
    for name, value in state.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        result[name] = value
    return result
