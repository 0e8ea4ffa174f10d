"""vjepa (V-JEPA 1) with fused attention: encoder, predictor and attentive classifier against the
untouched model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jepa_kernels.integrations import accelerate, patch
from jepa_kernels.testing import FLOAT32_DEEP
from tests.integrations.peers import DTYPES, check, peer, randomised, steps_apart

SIZES = dict(
    img_size=12, patch_size=4, num_frames=4, tubelet_size=2, num_heads=2, depth=2, qkv_bias=True
)


class Pair(nn.Module):
    """An encoder on the context and a predictor of the targets."""

    def __init__(self) -> None:
        super().__init__()
        vit = peer("vjepa", "vjepa.models.vision_transformer")
        predictor = peer("vjepa", "vjepa.models.predictor")
        self.encoder = randomised(vit.VisionTransformer(**SIZES, embed_dim=48))
        self.predictor = randomised(
            predictor.VisionTransformerPredictor(
                **SIZES, embed_dim=48, predictor_embed_dim=48, use_mask_tokens=True
            )
        )

    def forward(self, x):
        ids = torch.stack(
            [torch.randperm(18, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
        )
        return self.predictor(self.encoder(x, [ids[:, :8]]), None, [ids[:, :8]], [ids[:, 8:13]])


def call(model, x):
    return model(x)


def clips(height: int = 12, width: int = 12):
    return torch.randn(2, 3, 4, height, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_training_pair(dtype):
    report = check(Pair(), call, clips(), dtype)
    assert len(report.replaced["vjepa1"]) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attentive_classifier(dtype):
    """The cross-attention of this code base projects its output; V-JEPA 2's does not."""
    pooler = peer("vjepa", "vjepa.models.attentive_pooler")
    model = randomised(
        pooler.AttentiveClassifier(embed_dim=48, num_heads=2, depth=2, num_classes=3)
    )
    check(model, call, torch.randn(2, 10, 48), dtype)


def test_not_square_and_training_mode():
    check(Pair().encoder.train(), call, clips(8, 20), torch.float64)


def test_written_out_attention():
    modules = peer("vjepa", "vjepa.models.utils.modules")
    attention = randomised(modules.Attention(48, 2, qkv_bias=True, qk_scale=0.5, use_sdpa=False))
    check(attention, lambda model, x: model(x)[0], torch.randn(2, 9, 48), torch.float64)


def test_ten_steps_stay_together():
    assert steps_apart(Pair().train(), call, clips()) < FLOAT32_DEEP["rtol"]


def test_dropout_is_an_obstacle():
    """The original drops in evaluation too (it never asks whether it trains), so that this is left
    to it altogether."""
    modules = peer("vjepa", "vjepa.models.utils.modules")
    report = accelerate(modules.Attention(48, 2, proj_drop=0.1))
    assert report.left == {"": ["proj_drop must be 0, got 0.1"]}


def test_patch_reaches_models_built_inside():
    x = clips()
    plain = Pair()(x)
    with patch("vjepa1") as names:
        fused = Pair()(x)
    assert sorted(names) == [
        f"vjepa.models.utils.modules:{kind}" for kind in ("Attention", "CrossAttention")
    ]
    torch.testing.assert_close(fused, plain, **FLOAT32_DEEP)
    assert torch.equal(Pair()(x), plain)
