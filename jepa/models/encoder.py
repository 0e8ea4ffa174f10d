"""The vision transformer over the visible tokens of clips and images. Parameter names are those of
public V-JEPA 2.1-style code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jepa.batch import MaskBatch
from jepa.models.blocks import (
    EMBEDDING_STD,
    LAYER_NORM_EPS,
    Block,
    TokenLayout,
    blocks_of,
    initialise,
    rescale_residuals,
    run_block,
    stripped,
)
from jepa.models.patches import CHANNEL_MEAN, CHANNEL_STD, clip_grid, is_image
from jepa.models.sizes import ModelConfig
from jepa_kernels import Rope3D, frame_times, visible_patch_embed

Levels = Literal["all", "last"]


class PatchEmbed(nn.Module):
    """Holds a Conv3d with kernel = stride, so that weights load from public checkpoints; only the
    asked tubelets are read and multiplied."""

    def __init__(self, width: int, tubelet_size: int, patch_size: int) -> None:
        super().__init__()
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, width, kernel_size=kernel, stride=kernel)

    def forward(
        self, clips: Tensor, ids: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Embeddings of the tokens `ids`, packed set-major by `cu_seqlens`: [Nc, E]; of all tokens
        without ids: [B, N, E]. Clips as in `Encoder.forward`."""
        is_bytes = clips.dtype == torch.uint8
        return visible_patch_embed(
            clips.permute(0, 4, 1, 2, 3) if is_bytes else clips,
            self.proj.weight,
            self.proj.bias,
            ids=ids,
            cu_seqlens=cu_seqlens,
            mean=CHANNEL_MEAN if is_bytes else None,
            std=CHANNEL_STD if is_bytes else None,
        )


class Encoder(nn.Module):
    """Video tubelets or one-frame images to features of one or all levels. Only the asked tokens
    are embedded and computed.

    With `causal` a token sees its own time step and earlier ones: the features of the first t steps
    are those of a clip of t steps, and a clip can be encoded as it comes in.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.img_mod_embed = nn.Parameter(torch.empty(1, 1, width))
        self.video_mod_embed = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = PatchEmbed(width, config.tubelet_size, config.patch_size)
        self.patch_embed_img = PatchEmbed(width, 1, config.patch_size)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norms_block = nn.ModuleList(
            nn.LayerNorm(width, eps=LAYER_NORM_EPS) for _ in config.level_blocks
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.apply(initialise)
        rescale_residuals(blocks_of(self.blocks))
        nn.init.normal_(self.img_mod_embed, std=EMBEDDING_STD)
        nn.init.normal_(self.video_mod_embed, std=EMBEDDING_STD)

    def grid(self, clips: Tensor) -> tuple[int, int, int]:
        return clip_grid(clips, self.config.tubelet_size, self.config.patch_size)

    def rope(self, grid: tuple[int, int, int]) -> Rope3D:
        return Rope3D(
            grid, layout="interleaved", interpolate_from=self.config.rope_interpolate_from
        )

    def layout(
        self, ids: Tensor, cu_seqlens: Tensor | None, grid: tuple[int, int, int]
    ) -> TokenLayout:
        times = frame_times(grid, ids) if self.config.causal else None
        return TokenLayout(ids, cu_seqlens, self.rope(grid), times)

    def forward(
        self, clips: Tensor, masks: MaskBatch | None = None, levels: Levels = "all"
    ) -> Tensor:
        """Features of the visible tokens.

        Args:
            clips: uint8 [B, frames, H, W, 3] or normalised float [B, 3, frames, H, W]; one frame is
                an image.
            masks: computes the context tokens of every mask set and sample in one packed call; None
                computes all tokens.
            levels: "all" concatenates the normalised levels on channels; "last" gives the last one
                alone.

        Returns:
            [Nc, L*E] packed with `masks`, [B, N, L*E] without; E channels where `levels` is "last".

        Raises:
            ValueError: clips of another layout, sizes that patches do not divide, or masks of
                another grid.
        """
        grid = self.grid(clips)
        if masks is None:
            ids = torch.arange(grid[0] * grid[1] * grid[2], device=clips.device)
            tokens = self.embed(clips)
            return self.encode(tokens, self.layout(ids, None, grid), levels)
        if masks.grid != grid or masks.batch_size != clips.shape[0]:
            raise ValueError(
                f"Encoder: masks must be for {clips.shape[0]} clips of grid {grid}, got "
                f"{masks.batch_size} of grid {masks.grid}."
            )
        tokens = self.embed(clips, masks.context_ids, masks.context_cu)
        return self.encode(tokens, self.layout(masks.context_ids, masks.context_cu, grid), levels)

    def embed(
        self, clips: Tensor, ids: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Patch and modality embedding of tokens, as in `PatchEmbed.forward`."""
        if is_image(clips):
            image: Tensor = self.patch_embed_img(clips, ids, cu_seqlens) + self.img_mod_embed[0]
            return image
        video: Tensor = self.patch_embed(clips, ids, cu_seqlens) + self.video_mod_embed[0]
        return video

    def encode(self, tokens: Tensor, layout: TokenLayout, levels: Levels = "all") -> Tensor:
        """The blocks and level norms over embedded tokens."""
        taken = []
        level_of = {block: level for level, block in enumerate(self.config.level_blocks)}
        for i, block in enumerate(blocks_of(self.blocks)):
            tokens = run_block(block, tokens, layout, self.config.checkpoint_activations)
            if i in level_of and (levels == "all" or i == len(self.blocks) - 1):
                taken.append(self.norms_block[level_of[i]](tokens))
        return torch.cat(taken, dim=-1)

    def load_public(self, state: Mapping[str, Any]) -> None:
        """Loads a public checkpoint's encoder weights; wrapper prefixes are stripped, everything
        else must match.

        Raises:
            RuntimeError: missing or unexpected names, or other shapes, as `load_state_dict` says.
        """
        self.load_state_dict(stripped(dict(state)))
