"""facebookresearch V-JEPA 2, in its own repository layout and as packaged in cc-vjepa2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops.masked_attention import masked_attention
from ..rope3d import Rope3D
from .frame_causal import FrameCausalMask
from .replace import CodeBase, Foreign, Target, dropout_obstacles

# Where the modules are published: the repository's own packages, and the one on the package index.
_PATHS = ("src.models.utils.modules", "vjepa2.models.utils.modules")
_PREDICTORS = (
    "src.models.predictor:VisionTransformerPredictor",
    "vjepa2.models.predictor:VisionTransformerPredictor",
)
# Frames (in tubelets) that ids of a masked call may reach: the module extrapolates beyond the
# length it is configured for.
FRAMES = 256


def qkv(self: Foreign, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
    return query, key, value


def scale(self: Foreign) -> float | None:
    """The original passes its own scale only without SDPA; with it, SDPA's default holds whatever
    `qk_scale` said."""
    return None if self.use_sdpa else float(self.scale)


def sides(self: Foreign, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of the grid: both as given, else the module's own."""
    if height is None or width is None:
        return self.grid_size, self.grid_size
    return int(height), int(width)


def _no_mask(mask: object) -> None:
    if mask is not None:
        raise ValueError(
            "V-JEPA 2: attn_mask must be None with the fused op, got a mask. Call restore(model) "
            "to use masks."
        )


def _rope_forward(
    self: Foreign,
    x: Tensor,
    mask: Tensor | None = None,
    attn_mask: None = None,
    T: int | None = None,
    H_patches: int | None = None,
    W_patches: int | None = None,
) -> Tensor:
    _no_mask(attn_mask)
    sized = H_patches is not None and W_patches is not None
    height, width = sides(self, H_patches, W_patches)
    if mask is None:
        ids = torch.arange(x.shape[1], device=x.device)
        frames = int(T) if sized and T is not None else -(-x.shape[1] // (height * width))
    else:
        ids, frames = mask, FRAMES
    attended = masked_attention(
        *qkv(self, x),
        query_ids=ids,
        rope=Rope3D((frames, height, width), "tiled"),
        scale=scale(self),
    )
    out: Tensor = self.proj(attended.flatten(-2))
    return out


def _plain_forward(
    self: Foreign,
    x: Tensor,
    mask: Tensor | None = None,
    attn_mask: FrameCausalMask | None = None,
) -> Tensor:
    if isinstance(attn_mask, FrameCausalMask):
        attended = masked_attention(*qkv(self, x), query_times=attn_mask.times(x.device))
    else:
        _no_mask(attn_mask)
        attended = masked_attention(*qkv(self, x), scale=scale(self))
    out: Tensor = self.proj(attended.flatten(-2))
    return out


def cross_forward(self: Foreign, q: Tensor, x: Tensor) -> Tensor:
    query = self.q(q).unflatten(-1, (self.num_heads, -1))
    key, value = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
    return masked_attention(query, key, value).flatten(-2)


def _predictor_forward(
    self: Foreign,
    x: Tensor,
    masks_x: Tensor | list[Tensor],
    masks_y: Tensor | list[Tensor],
    mask_index: int = 1,
    has_cls: bool = False,
) -> Tensor:
    """The predictor's forward without sorting, unsorting and a mask token for every position of the
    clip."""
    if has_cls:
        raise ValueError(
            "V-JEPA 2: has_cls must be False with the unsorted predictor, got True. Call "
            "restore(model) to use it."
        )
    contexts, targets = (
        masks if isinstance(masks, list) else [masks] for masks in (masks_x, masks_y)
    )
    x = self.predictor_embed(x).repeat(len(contexts), 1, 1)
    context = x.shape[1]
    ids = torch.cat((torch.cat(contexts), torch.cat(targets)), dim=1)
    token = self.mask_tokens[mask_index % self.num_mask_tokens]
    x = torch.cat((x, token.expand(ids.shape[0], ids.shape[1] - context, -1).to(x.dtype)), dim=1)
    for block in self.predictor_blocks:
        if self.use_activation_checkpointing:
            x = checkpoint(block, x, ids, None, use_reentrant=False)
        else:
            x = block(x, mask=ids, attn_mask=None)
    predicted: Tensor = self.predictor_proj(self.predictor_norm(x[:, context:]))
    return predicted


def _predictor_obstacles(module: Foreign) -> list[str]:
    wanted = {"use_rope": True, "return_all_tokens": False, "chop_last_n_tokens": 0}
    return [
        f"{name} must be {value}, got {getattr(module, name)} (its order of tokens matters)"
        for name, value in wanted.items()
        if getattr(module, name) != value
    ]


def obstacles(module: Foreign) -> list[str]:
    reasons = dropout_obstacles(
        module, attn_drop=module.attn_drop.p, proj_drop=module.proj_drop_prob
    )
    if module.is_causal:
        reasons.append("is_causal must be False, got True")
    return reasons


def no_obstacles(module: Foreign) -> list[str]:
    return []


_AREAS = "tokens are attended to by area, not over the clip"
BASE = CodeBase(
    "vjepa2",
    "facebookresearch/vjepa2, cc-vjepa2",
    (
        Target(
            tuple(f"{p}:RoPEAttention" for p in _PATHS),
            _rope_forward,
            obstacles,
            "six rotations, concatenations and attention",
        ),
        Target(tuple(f"{p}:Attention" for p in _PATHS), _plain_forward, obstacles, "attention"),
        Target(
            tuple(f"{p}:CrossAttention" for p in _PATHS),
            cross_forward,
            no_obstacles,
            "cross-attention",
        ),
        Target(
            _PREDICTORS,
            _predictor_forward,
            _predictor_obstacles,
            "no sorting",
            option="unsorted_predictor",
        ),
    ),
    left_out={f"{path}:RoPEAreaAttention": _AREAS for path in _PATHS},
)
