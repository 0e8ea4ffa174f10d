"""The width and the heads of a ViT-L (1024 in 16 heads, predictor 384 in 12), one layer of each, in
the three code bases that publish it."""

from __future__ import annotations

import pytest
import torch

from jepa import convert
from jepa_kernels.integrations import accelerate
from jepa_kernels.testing import FLOAT32_DEEP
from tests.integrations.peers import check, peer, randomised

pytestmark = pytest.mark.slow
DTYPES = (torch.float32, torch.bfloat16)


def hugging_face():
    modeling = peer("transformers", "transformers.models.vjepa2.modeling_vjepa2")
    from transformers import VJEPA2Config

    sizes = dict(
        crop_size=64,
        frames_per_clip=4,
        hidden_size=1024,
        num_attention_heads=16,
        num_hidden_layers=1,
    )
    predictor = dict(
        pred_hidden_size=384,
        pred_num_attention_heads=12,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=2,
    )
    return randomised(
        modeling.VJEPA2Model(VJEPA2Config(**sizes, **predictor, attn_implementation="sdpa"))
    )


def public(kind: str = "vjepa2"):
    vit = peer(kind, f"{kind}.models.vision_transformer")
    norm = lambda width: torch.nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    sizes = dict(
        img_size=64,
        num_frames=4,
        embed_dim=1024,
        depth=1,
        num_heads=16,
        qkv_bias=True,
        norm_layer=norm,
    )
    return randomised(
        vit.VisionTransformer(**sizes, **(dict(use_rope=True) if kind == "vjepa2" else {}))
    )


def clips():
    return torch.randn(1, 4, 3, 64, 64)


def predicted(model, x):
    ids = torch.randperm(32, generator=torch.Generator().manual_seed(3))[None]
    out = model(pixel_values_videos=x, context_mask=[ids[:, :12]], target_mask=[ids[:, 12:20]])
    return out.predictor_output.last_hidden_state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers(dtype):
    check(hugging_face(), predicted, clips(), dtype, options=("unsorted_predictor",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["vjepa2", "vjepa"])
def test_public_encoders(kind, dtype):
    check(public(kind), lambda model, x: model(x), clips().transpose(1, 2), dtype)


def test_converted_weights_compute_the_same_in_both_accelerated_code_bases():
    theirs, ours = hugging_face(), public()
    converted = convert.convert({"encoder": dict(theirs.encoder.state_dict())}, "vjepa2")
    ours.load_state_dict(converted["encoder"])
    for model in (theirs, ours):
        accelerate(model)
    x = clips()
    with torch.no_grad():
        features = theirs(pixel_values_videos=x, skip_predictor=True).last_hidden_state
        torch.testing.assert_close(ours(x.transpose(1, 2)), features, **FLOAT32_DEEP)
