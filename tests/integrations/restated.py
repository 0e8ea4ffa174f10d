"""Frame-causal predictors of public code bases, written anew from their layouts: what accelerate
knows them by (names, parameters, attributes, signatures), and what they compute.

The published package is compared as well where it is installed; these are here so that a test of
the layout never only skips, and since no package holds DINO-WM.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def build_action_block_causal_attention_mask(T: int, H: int, W: int, add_tokens: int = 1) -> Tensor:
    frames = torch.ones(T, T, dtype=torch.bool).tril()
    per_frame = add_tokens + H * W
    return frames.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)


def turned(x: Tensor, position: Tensor) -> Tensor:
    """One axis of V-JEPA 2's rotation: channel c of m turns by the angle of frequency c mod m/2."""
    width = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    angle = (position.double()[:, None] * frequency).repeat(1, 2)
    partner = torch.empty_like(x)
    partner[..., 0::2], partner[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return x * angle.cos().to(x.dtype) + partner * angle.sin().to(x.dtype)


class ACRoPEAttention(nn.Module):
    """Patches turn by frame, row and column; the conditioning tokens ahead of them by frame."""

    def __init__(self, dim: int, num_heads: int, grid_size: int = 16, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.grid_size = num_heads, grid_size
        self.scale, self.use_sdpa, self.is_causal = (dim // num_heads) ** -0.5, True, False
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(proj_drop)
        self.proj_drop_prob = proj_drop

    def forward(self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0):
        if mask is not None:
            raise NotImplementedError("no caller gives token ids")
        query, key, value = (
            t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        )
        rotated = [self._rotated(t, T, H, W, action_tokens) for t in (query, key)]
        out = F.scaled_dot_product_attention(*rotated, value, attn_mask=attn_mask)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _rotated(self, x: Tensor, T: int, H: int, W: int, ahead: int) -> Tensor:
        m = 2 * (x.shape[-1] // 3 // 2)
        by_frame = x.unflatten(2, (T, ahead + H * W))
        conditioning, patches = by_frame[:, :, :, :ahead], by_frame[:, :, :, ahead:]
        rows = torch.arange(H).repeat_interleave(W) * (self.grid_size / H)
        columns = torch.arange(W).repeat(H) * (self.grid_size / W)
        frames = torch.arange(T)
        in_time = turned(by_frame[..., :m].flatten(2, 3), frames.repeat_interleave(ahead + H * W))
        in_space = torch.cat(
            (turned(patches[..., m : 2 * m], rows), turned(patches[..., 2 * m : 3 * m], columns)),
            dim=-1,
        )
        of_space = torch.cat((conditioning[..., m : 3 * m], in_space), dim=3).flatten(2, 3)
        return torch.cat((in_time, of_space, x[..., 3 * m :]), dim=-1)


class ACBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, grid_size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ACRoPEAttention(dim, num_heads, grid_size)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0):
        x = x + self.attn(self.norm1(x), mask, attn_mask, T, H, W, action_tokens)
        return x + self.mlp(self.norm2(x))


class VisionTransformerPredictorAC(nn.Module):
    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        num_frames: int = 1,
        tubelet_size: int = 2,
        embed_dim: int = 768,
        predictor_embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        action_embed_dim: int = 7,
        use_extrinsics: bool = False,
    ) -> None:
        super().__init__()
        self.grid_height, self.grid_width = (side // patch_size for side in img_size)
        self.use_extrinsics = use_extrinsics
        width = predictor_embed_dim
        self.predictor_embed = nn.Linear(embed_dim, width)
        self.action_encoder = nn.Linear(action_embed_dim, width)
        self.state_encoder = nn.Linear(action_embed_dim, width)
        self.extrinsics_encoder = nn.Linear(action_embed_dim - 1, width)
        self.predictor_blocks = nn.ModuleList(
            ACBlock(width, num_heads, self.grid_height) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(width)
        self.predictor_proj = nn.Linear(width, embed_dim)
        self.attn_mask = build_action_block_causal_attention_mask(
            num_frames // tubelet_size,
            self.grid_height,
            self.grid_width,
            add_tokens=3 if use_extrinsics else 2,
        )

    def forward(self, x, actions, states, extrinsics=None):
        patches = self.predictor_embed(x).unflatten(1, (-1, self.grid_height * self.grid_width))
        ahead = [self.action_encoder(actions), self.state_encoder(states)]
        if self.use_extrinsics:
            ahead.append(self.extrinsics_encoder(extrinsics))
        tokens = torch.cat((torch.stack(ahead, dim=2), patches), dim=2)
        frames, per_frame = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2)
        count = tokens.shape[1]
        mask = self.attn_mask[:count, :count].to(tokens.device, non_blocking=True)
        sizes = dict(T=frames, H=self.grid_height, W=self.grid_width, action_tokens=len(ahead))
        for block in self.predictor_blocks:
            tokens = block(tokens, mask=None, attn_mask=mask, **sizes)
        tokens = tokens.unflatten(1, (frames, per_frame))[:, :, len(ahead) :].flatten(1, 2)
        return self.predictor_proj(self.predictor_norm(tokens))


ACRoPEAttention.__module__ = "src.models.utils.modules"
VisionTransformerPredictorAC.__module__ = "src.models.ac_predictor"


class Attention(nn.Module):
    """DINO-WM's: materialised softmax, whose scores a dense mask of 0 and 1 fills with -inf."""

    def __init__(self, dim: int, heads: int, frames: int, patches: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.scale = heads, 32**-0.5
        self.norm, self.attend, self.dropout = (
            nn.LayerNorm(dim),
            nn.Softmax(-1),
            nn.Dropout(dropout),
        )
        self.to_qkv = nn.Linear(dim, 3 * heads * 32, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * 32, dim), nn.Dropout(dropout))
        self.bias = torch.kron(torch.ones(frames, frames).tril(), torch.ones(patches, patches))
        self.bias = self.bias[None, None]

    def forward(self, x):
        split = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) * self.scale
        hidden = self.bias[:, :, : x.shape[1], : x.shape[1]] == 0
        weights = self.dropout(self.attend(scores.masked_fill(hidden, float("-inf"))))
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))


class ViTPredictor(nn.Module):
    """Learned positions over frames x patches; no RoPE."""

    def __init__(
        self, num_patches: int, num_frames: int, dim: int, depth: int, heads: int, dropout=0.0
    ) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, num_frames * num_patches, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Attention(dim, heads, num_frames, num_patches, dropout),
                    nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU()),
                ]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = x + self.pos_embedding[:, : x.shape[1]]
        for attention, mlp in self.layers:
            x = x + attention(x)
            x = x + mlp(x)
        return self.norm(x)


Attention.__module__ = "models.vit"
