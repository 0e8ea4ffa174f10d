"""Drop-ins for the attention modules of V-JEPA 2 and 2.1: the same parameters and calls, RoPE and
attention in one op."""

from __future__ import annotations

import torch
from torch import nn

from ..checks import sentence
from ..ops.masked_attention import masked_attention
from ..rope3d import Rope3D, RopeLayout

# Frames (in tubelets) that ids may reach when a call gives neither `T` nor the module a grid: the
# table has one row for each.
_DEFAULT_FRAMES = 256


def _no_dropout(op: str, argument: str, probability: float) -> None:
    if probability != 0:
        raise ValueError(sentence(op, argument, "be 0 (the fused op has no dropout)", probability))


class RoPEAttention(nn.Module):
    """Multi-head self-attention with 3-D RoPE: `RoPEAttention` of V-JEPA 2 (arXiv 2506.09985) and
    of 2.1, fused.

    The state dict (``qkv.weight``, ``qkv.bias``, ``proj.weight``, ``proj.bias``) is that of the
    original, both ways.

    Args:
        dim: model width, a multiple of `num_heads`.
        num_heads, qkv_bias: as in the original.
        qk_scale: factor of the scores; None is ``head_dim ** -0.5``.
        attn_drop, proj_drop: must be 0; accepted so that the original's call stays valid.
        grid_size: tokens along each side of a frame when a call gives no `H_patches` and
            `W_patches`.
        layout: ``"tiled"`` for V-JEPA 2 checkpoints, ``"interleaved"`` for V-JEPA 2.1; never
            implied (see `jepa_kernels.rope3d`).
        interpolate_from: grid side of pre-training for position interpolation, or None.
        num_prefix: tokens ahead of the patches that are not rotated (a class token and registers).
        num_suffix: such tokens behind the patches (registers at the end).
        backend: passed to `masked_attention`.

    Raises:
        ValueError: a width that heads do not divide, or dropout.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        layout: RopeLayout,
        grid_size: int = 14,
        interpolate_from: int | None = None,
        num_prefix: int = 0,
        num_suffix: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                sentence("RoPEAttention", "dim", f"be a multiple of num_heads ({num_heads})", dim)
            )
        _no_dropout("RoPEAttention", "attn_drop", attn_drop)
        _no_dropout("RoPEAttention", "proj_drop", proj_drop)
        self.num_heads = num_heads
        self.scale = qk_scale
        self.layout = layout
        self.grid_size = grid_size
        self.interpolate_from = interpolate_from
        self.num_prefix = num_prefix
        self.num_suffix = num_suffix
        self.backend = backend
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        attn_mask: None = None,
        T: int | None = None,
        H_patches: int | None = None,
        W_patches: int | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention among the tokens of each clip.

        Args:
            x: ``[B, N, dim]``, or ``[tokens, dim]`` packed with `cu_seqlens`.
            mask: int32 or int64 token ids, ``[B, N]`` or ``[N]`` (packed ``[tokens]``), of the
                patches only: prefix and suffix tokens are not in it, except when packed, where ids
                    cover every row and -1 marks those. None: the patches are the whole grid in
                    order.
            attn_mask: must be None.
            T, H_patches, W_patches: the grid in tokens; None takes `grid_size` for a side and
                enough frames for the tokens.
            cu_seqlens: int32 or int64 ``[sequences + 1]`` offsets of packed clips.

        Returns:
            shaped like `x`.
        """
        if attn_mask is not None:
            raise ValueError(
                sentence(
                    "RoPEAttention",
                    "attn_mask",
                    "be None (pack the tokens that take part instead)",
                    "a tensor",
                )
            )
        height = self.grid_size if H_patches is None else int(H_patches)
        width = self.grid_size if W_patches is None else int(W_patches)
        ids = self._ids(x, mask, height, width, packed=cu_seqlens is not None)
        if T is None:
            T = _DEFAULT_FRAMES if mask is not None else -(-ids.shape[-1] // (height * width))
        rope = Rope3D((int(T), height, width), self.layout, self.interpolate_from)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        attended = masked_attention(
            query,
            key,
            value,
            query_ids=ids,
            rope=rope,
            cu_seqlens_q=cu_seqlens,
            scale=self.scale,
            backend=self.backend,
        )
        out: torch.Tensor = self.proj(attended.flatten(-2))
        return out

    def _ids(
        self, x: torch.Tensor, mask: torch.Tensor | None, height: int, width: int, packed: bool
    ) -> torch.Tensor:
        if packed:
            if mask is None:
                raise TypeError(
                    sentence("RoPEAttention", "mask", "be given with cu_seqlens", "None")
                )
            return mask
        extra = self.num_prefix + self.num_suffix
        if mask is None:
            mask = torch.arange(x.shape[1] - extra, device=x.device)
        if extra == 0:
            return mask
        shape = (*mask.shape[:-1], self.num_prefix), (*mask.shape[:-1], self.num_suffix)
        return torch.cat((mask.new_full(shape[0], -1), mask, mask.new_full(shape[1], -1)), dim=-1)


class CrossAttention(nn.Module):
    """Cross-attention of V-JEPA's attentive pooler: queries attend to tokens, without positions and
    without an output projection.

    The state dict (``q.weight``, ``q.bias``, ``kv.weight``, ``kv.bias``) is that of the original,
    both ways.

    Args:
        dim, num_heads, qkv_bias: as in the original.
        backend: passed to `masked_attention`.
    """

    def __init__(
        self, dim: int, num_heads: int = 12, qkv_bias: bool = False, *, backend: str | None = None
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                sentence("CrossAttention", "dim", f"be a multiple of num_heads ({num_heads})", dim)
            )
        self.num_heads = num_heads
        self.backend = backend
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias)

    def forward(
        self,
        q: torch.Tensor,
        x: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each query attends to the tokens of its clip.

        Args:
            q: ``[B, Nq, dim]`` or packed ``[queries, dim]``. x: ``[B, N, dim]`` or packed
                ``[tokens, dim]``.
            cu_seqlens_q, cu_seqlens_k: offsets of packed clips, both or neither.

        Returns:
            shaped like `q`.
        """
        query = self.q(q).unflatten(-1, (self.num_heads, -1))
        key, value = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        out = masked_attention(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            backend=self.backend,
        )
        return out.flatten(-2)
