"""cc-vjepa2 with fused attention: encoder, predictor and attentive classifier against the untouched
model."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from jepa_kernels.integrations import accelerate, patch
from jepa_kernels.testing import FLOAT32_DEEP
from tests.integrations.peers import DTYPES, check, peer, randomised, results, steps_apart

SIZES = dict(
    img_size=12,
    patch_size=4,
    num_frames=4,
    tubelet_size=2,
    num_heads=2,
    depth=2,
    qkv_bias=True,
    use_rope=True,
)


def encoder(**changes):
    vit = peer("vjepa2", "vjepa2.models.vision_transformer")
    return randomised(vit.VisionTransformer(**(SIZES | dict(embed_dim=48) | changes)))


class Pair(nn.Module):
    """An encoder on the context and a predictor of the targets, as the public training loop joins
    them."""

    def __init__(self, **changes) -> None:
        super().__init__()
        predictor = peer("vjepa2", "vjepa2.models.predictor")
        self.encoder = encoder(**changes)
        sizes = dict(embed_dim=48, predictor_embed_dim=48, use_mask_tokens=True)
        self.predictor = randomised(predictor.VisionTransformerPredictor(**(SIZES | sizes)))

    def forward(self, x):
        ids = torch.stack(
            [torch.randperm(18, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
        )
        context, targets = ids[:, :8].sort(1).values, ids[:, 8:13]
        return self.predictor(self.encoder(x, context), context, targets)


class Unordered(Pair):
    """As above, with target ids in no order, a mask token of its own choice and activation
    checkpointing."""

    def forward(self, x):
        ids = torch.stack(
            [torch.randperm(18, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
        )
        return self.predictor(
            self.encoder(x, ids[:, :8]), [ids[:, :8]], [ids[:, 8:13]], mask_index=2
        )


def clips(frames: int = 4, height: int = 12, width: int = 12):
    return torch.randn(2, 3, frames, height, width)


def call(model, x):
    return model(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "sincos"])
def test_encoder(rope, dtype):
    report = check(encoder(use_rope=rope), call, clips(), dtype)
    assert report.replaced == {"vjepa2": ["blocks.0.attn", "blocks.1.attn"]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_training_pair(dtype):
    check(Pair(), call, clips(), dtype)


@pytest.mark.parametrize(
    "kind, dtype",
    [*((Pair, dtype) for dtype in DTYPES), (Unordered, torch.float64), (Unordered, torch.float32)],
)
def test_unsorted_predictor(kind, dtype):
    pair = kind()
    pair.predictor.use_activation_checkpointing = kind is Unordered
    report = check(pair, call, clips(), dtype, options=("unsorted_predictor",))
    assert "predictor" in report.replaced["vjepa2"]


def test_predictors_whose_order_matters_stay():
    pair = Pair()
    pair.predictor.chop_last_n_tokens, pair.predictor.return_all_tokens = 2, True
    reasons = accelerate(pair, options=("unsorted_predictor",)).left["predictor"]
    assert [reason.partition(" must")[0] for reason in reasons] == [
        "return_all_tokens",
        "chop_last_n_tokens",
    ]


@pytest.mark.parametrize("shape", [(4, 8, 20), (6, 16, 8), (8, 12, 12)], ids=str)
def test_other_sizes_than_configured(shape):
    check(encoder(), call, clips(*shape), torch.float64)
    check(encoder(), call, clips(*shape), torch.float32)


def test_masked_and_not_square():
    ids = torch.stack([torch.randperm(20)[:7] for _ in range(2)])
    check(encoder(), lambda model, x: model(x, ids), clips(4, 8, 20), torch.float64)


def test_square_grids_without_the_option_for_others():
    check(encoder(handle_nonsquare_inputs=False), call, clips(), torch.float64)


def test_written_out_attention_and_its_own_scale():
    """Without SDPA the original uses `qk_scale`; with it, it does not."""
    sizes = dict(use_sdpa=False, qk_scale=0.5)
    check(encoder(**sizes), call, clips(), torch.float64)
    check(encoder(use_sdpa=True, qk_scale=0.5), call, clips(), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attentive_classifier(dtype):
    pooler = peer("vjepa2", "vjepa2.models.attentive_pooler")
    model = randomised(
        pooler.AttentiveClassifier(embed_dim=48, num_heads=2, depth=2, num_classes=3)
    )
    report = check(model, call, torch.randn(2, 10, 48), dtype)
    assert report.replaced["vjepa2"] == [
        "pooler.cross_attention_block.xattn",
        "pooler.blocks.0.attn",
    ]


def test_ten_steps_stay_together():
    assert steps_apart(Pair().train(), call, clips()) < FLOAT32_DEEP["rtol"]


def test_activation_checkpointing():
    saving, plain = encoder(use_activation_checkpointing=True).train(), encoder().train()
    accelerate(saving)
    x = clips()
    ours, theirs = results(saving, call, x), results(plain, call, x)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, **FLOAT32_DEEP, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_compiled():
    model = encoder()
    accelerate(model)
    attention = model.blocks[0].attn
    compiled = torch.compile(
        partial(attention, T=2, H_patches=3, W_patches=3), backend="aot_eager", fullgraph=True
    )
    x = torch.randn(1, 18, 48)
    torch.testing.assert_close(compiled(x), attention(x, T=2, H_patches=3, W_patches=3))


def test_obstacles_and_what_is_left_out():
    modules = peer("vjepa2", "vjepa2.models.utils.modules")
    report = accelerate(
        nn.ModuleDict(
            {
                "drops": modules.RoPEAttention(48, 2, proj_drop=0.1),
                "causal": modules.Attention(48, 2, is_causal=True),
            }
        )
    )
    assert report.left == {
        "drops": ["proj_drop must be 0, got 0.1"],
        "causal": ["is_causal must be False, got True"],
    }
    report = accelerate(encoder(use_area_attention=True, area_attention_layers=[0, 1]))
    assert report.replaced == {"vjepa2": ["blocks.1.attn"]}
    assert list(report.left) == ["blocks.0.attn"]


def test_masks_are_refused():
    attention = encoder().blocks[0].attn
    accelerate(attention)
    with pytest.raises(ValueError, match="attn_mask must be None"):
        attention(torch.randn(1, 18, 48), attn_mask=torch.ones(18, 18, dtype=torch.bool))


def test_patch_reaches_models_built_inside():
    x = clips()
    plain = encoder()(x)
    with patch("vjepa2") as names:
        fused = encoder()(x)
    assert sorted(names) == [
        f"vjepa2.models.utils.modules:{kind}"
        for kind in ("Attention", "CrossAttention", "RoPEAttention")
    ]
    torch.testing.assert_close(fused, plain, **FLOAT32_DEEP)
    assert torch.equal(encoder()(x), plain)


def test_teacher_is_a_copy():
    """The public loop copies the encoder for its teacher: the copy must compute with its own
    weights."""
    student = encoder()
    accelerate(student)
    teacher = copy.deepcopy(student)
    x = clips()
    before = teacher(x)
    with torch.no_grad():
        student.blocks[0].attn.qkv.weight.mul_(2)
    assert torch.equal(teacher(x), before)
    assert not torch.equal(student(x), before)
