"""The action-conditioned predictor of V-JEPA 2 (V-JEPA 2-AC), in the repository, as packaged in
cc-vjepa2, and in jepa-wms: frame times take the place of its dense mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device_tables import DeviceTables
from ..ops.masked_attention import masked_attention
from ..rope3d import Rope3D
from ..times import FrameTokens, frame_tokens
from .frame_causal import FrameCausalMask, stand_in
from .replace import CodeBase, DenseMask, Foreign, Target
from .vjepa2 import obstacles, qkv

_JEPA_WMS = "app.plan_common.models"
_MODULES = (
    "src.models.ac_predictor",
    "vjepa2.models.ac_predictor",
    f"{_JEPA_WMS}.ac_predictor_upd",
)
_PREDICTORS = tuple(f"{path}:VisionTransformerPredictorAC" for path in _MODULES)
_BUILDERS = tuple(f"{path}:build_action_block_causal_attention_mask" for path in _MODULES)
_ATTENTION = (
    "src.models.utils.modules:ACRoPEAttention",
    "vjepa2.models.utils.modules:ACRoPEAttention",
    f"{_JEPA_WMS}.modules:RoPEAttention",
)
# A predictor asks for one grid and length in all its layers.
_tokens = DeviceTables(16)


def _forward(
    self: Foreign,
    x: Tensor,
    mask: None = None,
    attn_mask: FrameCausalMask | None = None,
    T: int = 0,
    H: int = 0,
    W: int = 0,
    action_tokens: int = 0,
) -> Tensor:
    grid = (int(T), int(H), int(W))
    # Action, state and extrinsics tokens are rotated by the time of their frame alone: the id of
    # its first patch, whose row and column are 0.
    order = _order(grid, int(action_tokens), x.device)
    attended = masked_attention(
        *qkv(self, x),
        **order._asdict(),
        rope=Rope3D(grid, "tiled", int(self.grid_size), interpolation="size"),
    )
    out: Tensor = self.proj(attended.flatten(-2))
    return out


def _order(grid: tuple[int, int, int], conditioning: int, device: torch.device) -> FrameTokens:
    def make() -> FrameTokens:
        return frame_tokens(grid, conditioning=conditioning, device=device)

    if torch.compiler.is_compiling():
        return make()
    return FrameTokens(*_tokens.get((grid, conditioning, device), device, make))


def _keeps(
    self: Foreign,
    x: Tensor,
    mask: Tensor | None = None,
    attn_mask: object = None,
    T: int | None = None,
    H: int | None = None,
    W: int | None = None,
    action_tokens: int = 0,
) -> bool:
    """Without a mask, under one of the caller's own, and over a part of the tokens the original
    runs."""
    if mask is not None or not isinstance(attn_mask, FrameCausalMask):
        return True
    if T is None or H is None or W is None:
        return True
    return attn_mask.length != x.shape[1] or attn_mask.per_frame != action_tokens + H * W


def _build(T: int, H: int, W: int, add_tokens: int = 1) -> FrameCausalMask:
    """What `build_action_block_causal_attention_mask` makes dense."""
    return FrameCausalMask(T, add_tokens + H * W)


BASE = CodeBase(
    "vjepa2-ac",
    "facebookresearch/vjepa2, cc-vjepa2, facebookresearch/jepa-wms",
    (
        Target(
            _ATTENTION,
            _forward,
            obstacles,
            "rotations, concatenations and attention without a dense mask",
            keeps=_keeps,
        ),
    ),
    masks=(DenseMask(_PREDICTORS, "attn_mask", stand_in, _BUILDERS, _build),),
)
