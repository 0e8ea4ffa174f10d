"""The predictor: context features in, features at target tokens and at context tokens out. Names as
in public V-JEPA 2.1-style code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
from jepa.models.sizes import ModelConfig
from jepa_kernels import Rope3D


@dataclass(frozen=True)
class JointOrder:
    """Where context and target tokens sit when each sequence holds its context, then its targets,
    and how to get there."""

    context_rows: Tensor  # int64 [Nc]: joint row of each context token
    target_rows: Tensor  # int64 [Nt]
    source: (
        Tensor  # int64 [Nc + Nt]: row of (context tokens, then target tokens) for each joint row
    )
    ids: Tensor  # int64 [Nc + Nt]
    cu_seqlens: Tensor  # int32 [J*B + 1]

    @classmethod
    def of(cls, masks: MaskBatch) -> JointOrder:
        context, target = masks.context_ids.shape[0], masks.target_ids.shape[0]
        device = masks.context_ids.device
        context_index, target_index = (
            torch.arange(context, device=device),
            torch.arange(target, device=device),
        )
        # Before context token i of sequence s lie the i context tokens before it and all targets of
        # the sequences before s; before target token k lie the k targets before it and the context
        # of sequences up to and including s.
        context_sequence = torch.searchsorted(
            masks.context_cu[1:].to(torch.int64), context_index, right=True
        )
        target_sequence = torch.searchsorted(
            masks.target_cu[1:].to(torch.int64), target_index, right=True
        )
        context_rows = context_index + masks.target_cu[:-1].index_select(0, context_sequence)
        target_rows = target_index + masks.context_cu[1:].index_select(0, target_sequence)
        source = torch.empty(context + target, dtype=torch.int64, device=device)
        source.index_copy_(0, context_rows, context_index)
        source.index_copy_(0, target_rows, target_index + context)
        ids = torch.cat([masks.context_ids, masks.target_ids]).index_select(0, source)
        return cls(context_rows, target_rows, source, ids, masks.context_cu + masks.target_cu)


class Predictor(nn.Module):
    """A narrow transformer over context and mask tokens. Positions come from ids, so tokens need no
    sorting."""

    def __init__(self, config: ModelConfig, shared_mask_token: bool = False) -> None:
        """`shared_mask_token`: every mask set uses token 0 (published); else set j uses token j
        modulo their number."""
        super().__init__()
        self.config = config
        self.shared_mask_token = shared_mask_token
        own, features = config.predictor, config.feature_width
        self.video_mod_embed = nn.Parameter(torch.empty(1, 1, own.width))
        self.img_mod_embed = nn.Parameter(torch.empty(1, 1, own.width))
        self.predictor_embed = nn.Sequential(
            nn.Linear(features, config.width), nn.GELU(), nn.Linear(config.width, own.width)
        )
        self.mask_tokens = nn.ParameterList(
            nn.Parameter(torch.empty(1, 1, own.width)) for _ in range(own.mask_tokens)
        )
        self.predictor_blocks = nn.ModuleList(
            Block(own.width, own.heads, own.mlp_ratio) for _ in range(own.depth)
        )
        self.predictor_norm = nn.LayerNorm(own.width, eps=LAYER_NORM_EPS)
        self.predictor_proj = nn.Linear(own.width, features)
        self.predictor_proj_context = nn.Linear(own.width, features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.apply(initialise)
        rescale_residuals(blocks_of(self.predictor_blocks))
        for token in self.mask_tokens:
            nn.init.zeros_(token)
        nn.init.normal_(self.video_mod_embed, std=EMBEDDING_STD)
        nn.init.normal_(self.img_mod_embed, std=EMBEDDING_STD)

    def forward(
        self,
        context_tokens: Tensor,
        masks: MaskBatch,
        *,
        image: bool = False,
        predict_context: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Predictions of every mask set and sample in one packed call.

        Args:
            context_tokens: [Nc, L*E], the context encoder's output.
            masks: ids and sequences of context and targets.
            image: the tokens are those of one-frame images.
            predict_context: also project the context tokens; False saves that work.

        Returns:
            [Nt, L*E] at the targets, and [Nc, L*E] at the context or None.
        """
        order = JointOrder.of(masks)
        embedded = self.predictor_embed(context_tokens)
        modality = self.img_mod_embed if image else self.video_mod_embed
        asked = self._mask_tokens(masks, embedded.dtype)
        tokens = torch.cat([embedded, asked]).index_select(0, order.source) + modality[0].to(
            embedded.dtype
        )
        layout = TokenLayout(
            order.ids,
            order.cu_seqlens,
            Rope3D(masks.grid, "interleaved", self.config.rope_interpolate_from),
        )
        for block in blocks_of(self.predictor_blocks):
            tokens = run_block(block, tokens, layout, self.config.checkpoint_activations)
        # Normalised before the split: the norm is per token, and one call serves both outputs.
        tokens = self.predictor_norm(tokens)
        predicted = self.predictor_proj(tokens.index_select(0, order.target_rows))
        if not predict_context:
            return predicted, None
        return predicted, self.predictor_proj_context(tokens.index_select(0, order.context_rows))

    def _mask_tokens(self, masks: MaskBatch, dtype: torch.dtype) -> Tensor:
        """The mask token of each target, [Nt, width]."""
        if self.shared_mask_token or masks.num_sets == 1 or len(self.mask_tokens) == 1:
            shared: Tensor = self.mask_tokens[0][0].to(dtype)
            return shared.expand(masks.target_ids.shape[0], -1)
        count = min(len(self.mask_tokens), masks.num_sets)
        table = torch.cat([token[0] for token in list(self.mask_tokens)[:count]]).to(dtype)
        # A product with a selection matrix: its gradient is a sum in fixed order, where that of
        # indexing adds atomically.
        kind = torch.remainder(masks.target_set, count)
        selection = (kind[:, None] == torch.arange(count, device=kind.device)).to(dtype)
        return selection @ table

    def load_public(self, state: Mapping[str, Any]) -> None:
        """Loads a public checkpoint's predictor weights; wrapper prefixes are stripped, everything
        else must match.

        Raises:
            RuntimeError: missing or unexpected names, or other shapes, as `load_state_dict` says.
        """
        self.load_state_dict(stripped(dict(state)))
