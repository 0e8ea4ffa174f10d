"""Other people's encoders, built by their own code in the sizes of the benchmark; what is not
installed is named, not skipped in silence."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DEPTH = 4
WIDTHS = {"vit_s": (384, 6), "vit_l": (1024, 16)}


@dataclass(frozen=True)
class Peer:
    """An encoder of a code base.

    Args:
        model: in evaluation mode, random weights, SDPA where the code base has a choice.
        call: the model's features of its clips.
        clip: [B, ...] in the layout that the code base takes.
        attention: path of its first attention module.
    """

    model: nn.Module
    call: Callable[[nn.Module, Tensor], Tensor]
    clip: Tensor
    attention: str


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    if not drop_prob or not training:
        return x
    kept = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), dtype=x.dtype) >= drop_prob
    return x * kept / (1 - drop_prob)


def provide_timm() -> None:
    """cc-vjepa2 takes one function from timm, which needs torchvision; where timm cannot be
    imported, that function stands in."""
    try:
        importlib.import_module("timm.models.layers")
    except ModuleNotFoundError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
            del sys.modules[name]
        for name in ("timm", "timm.models", "timm.models.layers"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["timm.models.layers"].drop_path = drop_path


def _transformers_vjepa2(side: int, frames: int, width: int, heads: int, depth: int) -> Peer:
    from transformers import VJEPA2Config, VJEPA2Model

    sizes = dict(
        crop_size=side,
        frames_per_clip=frames,
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=depth,
    )
    model = VJEPA2Model(
        VJEPA2Config(**sizes, pred_num_hidden_layers=1, attn_implementation="sdpa")
    ).encoder
    return Peer(
        model,
        lambda module, clip: module(clip).last_hidden_state,
        torch.randn(1, frames, 3, side, side),
        "layer.0.attention",
    )


def _transformers_ijepa(side: int, frames: int, width: int, heads: int, depth: int) -> Peer:
    """As many images as a clip has pairs of frames, so that the number of tokens is that of the
    other rows."""
    from transformers import IJepaConfig, IJepaModel

    sizes = dict(
        image_size=side,
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=depth,
        intermediate_size=4 * width,
    )
    drop = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = IJepaModel(
        IJepaConfig(**sizes, **drop, patch_size=16, attn_implementation="sdpa"),
        add_pooling_layer=False,
    )
    path = next(
        name
        for name, module in model.named_modules()
        if hasattr(module, "q_proj") or hasattr(module, "query")
    )
    return Peer(
        model,
        lambda module, images: module(images).last_hidden_state,
        torch.randn(frames // 2, 3, side, side),
        path,
    )


def _vjepa2(side: int, frames: int, width: int, heads: int, depth: int) -> Peer:
    provide_timm()
    from vjepa2.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=side,
        num_frames=frames,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        use_rope=True,
    )
    return Peer(
        model,
        lambda module, clip: module(clip),
        torch.randn(1, 3, frames, side, side),
        "blocks.0.attn",
    )


def _vjepa1(side: int, frames: int, width: int, heads: int, depth: int) -> Peer:
    from vjepa.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=side, num_frames=frames, embed_dim=width, depth=depth, num_heads=heads
    )
    return Peer(
        model,
        lambda module, clip: module(clip),
        torch.randn(1, 3, frames, side, side),
        "blocks.0.attn",
    )


def _vjepa2_ac(side: int, frames: int, width: int, heads: int, depth: int) -> Peer:
    """The action-conditioned predictor on the features of a clip; bfloat16 under autocast, since
    its rotated queries are float32 whatever its weights are."""
    provide_timm()
    from vjepa2.models.ac_predictor import VisionTransformerPredictorAC

    model = VisionTransformerPredictorAC(
        img_size=(side, side),
        num_frames=frames,
        embed_dim=width,
        predictor_embed_dim=width,
        depth=depth,
        num_heads=heads,
    )
    steps, spatial = frames // 2, model.grid_height * model.grid_width

    def call(module: nn.Module, features: Tensor) -> Tensor:
        conditioning = features.new_ones(features.shape[0], steps, 7)
        halves = features.dtype == torch.bfloat16
        with torch.autocast(features.device.type, torch.bfloat16, enabled=halves):
            return module(features, conditioning, conditioning)

    features = torch.randn(1, steps * spatial, width)
    return Peer(model, call, features, "predictor_blocks.0.attn")


_BUILDERS = {
    "transformers-vjepa2": ("transformers", _transformers_vjepa2),
    "vjepa2": ("vjepa2", _vjepa2),
    "vjepa2-ac": ("vjepa2", _vjepa2_ac),
    "vjepa1": ("vjepa", _vjepa1),
    "transformers-ijepa": ("transformers", _transformers_ijepa),
}


def installed() -> list[str]:
    """Names of the code bases whose package is here, in the order of their importance; the others
    are printed."""
    found = []
    for name, (package, _) in _BUILDERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"left out: {name} ({package} is not installed)")
        else:
            found.append(name)
    return found


def build(name: str, *, side: int, frames: int, size: str, depth: int = DEPTH) -> Peer:
    """The encoder of a code base, `size` of WIDTHS wide."""
    width, heads = WIDTHS[size]
    peer = _BUILDERS[name][1](side, frames, width, heads, depth)
    peer.model.eval()
    return peer
