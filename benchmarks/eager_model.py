"""Encoder and predictor of the eager reproduction of the published step: one call per mask set,
tokens sorted by id in the predictor, rotation in every block.

Parameter names are those of the public V-JEPA 2.1-style code, so golden states load as they are.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.eager_attention import EagerRoPEAttention

LEVELS = {4: (0, 1, 2, 3), 12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39)}


def gather(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` [B, K] of `x` [B, N, D]."""
    return torch.gather(x, 1, ids.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, *, rope: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = EagerRoPEAttention(dim, heads, rope=rope)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(
        self, x: torch.Tensor, ids: torch.Tensor | None, grid: tuple[int, int, int]
    ) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), ids, grid)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, tubelet_size: int, patch_size: int) -> None:
        super().__init__()
        size = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, dim, kernel_size=size, stride=size)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.proj(clip).flatten(2).transpose(1, 2)


class EagerEncoder(nn.Module):
    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        patch_size: int = 16,
        tubelet_size: int = 2,
        checkpointing: bool = False,
        rope: bool = True,
    ) -> None:
        super().__init__()
        self.levels, self.checkpointing = LEVELS[depth], checkpointing
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        self.patch_embed, self.patch_embed_img = (
            PatchEmbed(dim, tubelet_size, patch_size),
            PatchEmbed(dim, 1, patch_size),
        )
        self.video_mod_embed, self.img_mod_embed = (
            nn.Parameter(torch.zeros(1, 1, dim)),
            nn.Parameter(torch.zeros(1, 1, dim)),
        )
        self.blocks = nn.ModuleList(Block(dim, heads, rope=rope) for _ in range(depth))
        self.norms_block = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in self.levels)

    def forward(self, clip: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """[B, 3, frames, height, width] to [B, K, 4 * dim]; the whole clip is embedded before the
        context is gathered."""
        grid = (
            clip.shape[2] // self.tubelet_size,
            clip.shape[3] // self.patch_size,
            clip.shape[4] // self.patch_size,
        )
        x = self.patch_embed(clip) + self.video_mod_embed
        if ids is not None:
            x = gather(x, ids)
        outputs: list[torch.Tensor] = []
        for number, block in enumerate(self.blocks):
            x = (
                checkpoint(block, x, ids, grid, use_reentrant=False)
                if self.checkpointing
                else block(x, ids, grid)
            )
            if number in self.levels:
                outputs.append(self.norms_block[len(outputs)](x))
        return torch.cat(outputs, dim=-1)


class EagerPredictor(nn.Module):
    def __init__(
        self,
        encoder_dim: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        checkpointing: bool = False,
        rope: bool = True,
    ) -> None:
        super().__init__()
        wide = 4 * encoder_dim
        self.checkpointing = checkpointing
        self.predictor_embed = nn.Sequential(
            nn.Linear(wide, encoder_dim), nn.GELU(), nn.Linear(encoder_dim, dim)
        )
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, dim)) for _ in range(6))
        self.video_mod_embed, self.img_mod_embed = (
            nn.Parameter(torch.zeros(1, 1, dim)),
            nn.Parameter(torch.zeros(1, 1, dim)),
        )
        self.predictor_blocks = nn.ModuleList(Block(dim, heads, rope=rope) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj, self.predictor_proj_context = (
            nn.Linear(dim, wide),
            nn.Linear(dim, wide),
        )

    def forward(
        self,
        z: torch.Tensor,
        context_ids: torch.Tensor,
        target_ids: torch.Tensor,
        grid: tuple[int, int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(prediction at the targets, prediction at the context). Tokens are sorted by id before
        the blocks and unsorted after."""
        context = self.predictor_embed(z)
        batch, seen = context_ids.shape
        masked = self.mask_tokens[0].expand(batch, target_ids.shape[1], -1).to(context.dtype)
        x = torch.cat([context, masked], dim=1)
        ids = torch.cat([context_ids, target_ids], dim=1)
        order = torch.argsort(ids, dim=1)
        ids = torch.gather(ids, 1, order)
        x = gather(x, order) + self.video_mod_embed
        for block in self.predictor_blocks:
            x = (
                checkpoint(block, x, ids, grid, use_reentrant=False)
                if self.checkpointing
                else block(x, ids, grid)
            )
        x = gather(self.predictor_norm(x), torch.argsort(order, dim=1))
        return self.predictor_proj(x[:, seen:]), self.predictor_proj_context(x[:, :seen])
