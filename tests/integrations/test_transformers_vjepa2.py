"""Hugging Face VJEPA2 with fused attention: encoder, predictor, pooler and classifier against the
untouched model."""

from __future__ import annotations

import copy

import pytest
import torch

from jepa_kernels import use_backend
from jepa_kernels.integrations import accelerate, patch, restore
from jepa_kernels.integrations.transformers_vjepa2 import encode_context, predict_targets
from jepa_kernels.testing import FLOAT32_DEEP, assert_within_budget
from tests.integrations.peers import DTYPES, check, peer, randomised, results, steps_apart

GRID = (2, 3, 3)


def config(**changes):
    sizes = dict(
        patch_size=4,
        crop_size=12,
        frames_per_clip=4,
        tubelet_size=2,
        hidden_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    predictor = dict(
        pred_hidden_size=48,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=2,
    )
    pooler = dict(num_pooler_layers=1, num_labels=3)
    peer("transformers", "transformers.models.vjepa2.modeling_vjepa2")
    from transformers import VJEPA2Config

    return VJEPA2Config(**(sizes | predictor | pooler | dict(attn_implementation="sdpa") | changes))


def model(kind: str = "VJEPA2Model", **changes):
    modeling = peer("transformers", "transformers.models.vjepa2.modeling_vjepa2")
    return randomised(getattr(modeling, kind)(config(**changes)))


def clips(frames: int = 4, side: int = 12):
    return torch.randn(2, frames, 3, side, side)


def encoder(model, x):
    return model(pixel_values_videos=x, skip_predictor=True).last_hidden_state


def masked(model, x):
    """The predictor's output for unsorted context and target ids, a different set for each clip."""
    ids = torch.stack(
        [torch.randperm(18, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    )
    return model(
        pixel_values_videos=x, context_mask=[ids[:, :8]], target_mask=[ids[:, 8:13]]
    ).predictor_output.last_hidden_state


def classified(model, x):
    return model(pixel_values_videos=x).logits


# The written-out softmax of transformers is float32 whatever the model is.
@pytest.mark.parametrize(
    "implementation, dtype",
    [*(("sdpa", dtype) for dtype in DTYPES), ("eager", torch.float32), ("eager", torch.bfloat16)],
    ids=str,
)
def test_encoder(implementation, dtype):
    report = check(model(attn_implementation=implementation), encoder, clips(), dtype)
    assert len(report.replaced["transformers-vjepa2"]) == 4
    assert not report.left


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_predictor_with_masks(dtype):
    check(model(), masked, clips(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classifier(dtype):
    report = check(model("VJEPA2ForVideoClassification"), classified, clips(), dtype)
    names = report.replaced["transformers-vjepa2"]
    assert any("cross_attn" in name for name in names)
    assert any("self_attn" in name for name in names)


def test_clips_longer_than_configured_and_a_single_frame():
    whole = model()
    for frames in (8, 1):
        check(whole, encoder, clips(frames), torch.float32)


def test_a_width_that_the_axes_do_not_divide():
    """Heads of 32 channels: 10 for each axis and two left unrotated; heads of 64 at the width of a
    ViT-L would be 20 and four."""
    check(model(hidden_size=64), encoder, clips(), torch.float64)


def test_training_mode_draws_the_same_stochastic_depth():
    whole = model(drop_path_rate=0.5).train()
    fused = copy.deepcopy(whole)
    accelerate(fused)
    outs = []
    for module in (whole, fused):
        torch.manual_seed(5)
        outs.append(results(module, encoder, clips(4).mul(0).add(0.3)))
    for name, value in outs[0].items():
        torch.testing.assert_close(
            outs[1][name],
            value,
            **FLOAT32_DEEP,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_ten_steps_stay_together():
    assert steps_apart(model().train(), masked, clips()) < FLOAT32_DEEP["rtol"]


def test_activation_checkpointing():
    saving = model().train()
    plain = copy.deepcopy(saving)
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    x = clips()
    accelerate(saving)
    ours, theirs = results(saving, masked, x), results(plain, masked, x)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, **FLOAT32_DEEP, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_compiled():
    attention = model().encoder.layer[0].attention
    accelerate(attention)
    x = torch.randn(1, 18, 48)
    torch.testing.assert_close(
        torch.compile(attention, backend="aot_eager", fullgraph=True)(x)[0], attention(x)[0]
    )


def test_masks_and_probabilities_are_refused():
    whole = model("VJEPA2ForVideoClassification")
    accelerate(whole)
    layer = whole.vjepa2.encoder.layer[0].attention
    with pytest.raises(ValueError, match="head_mask must be None"):
        layer(torch.randn(1, 18, 48), head_mask=torch.ones(2))
    pooler = whole.pooler.self_attention_layers[0].self_attn
    with pytest.raises(ValueError, match="attention_mask must be None"):
        pooler(torch.randn(1, 18, 48), attention_mask=torch.zeros(1, 1, 18, 18))


def test_attention_weights_are_an_obstacle():
    report = accelerate(model(output_attentions=True, attn_implementation="eager"))
    assert not report.replaced
    assert "config.output_attentions must be False" in str(report)


def test_dropout_is_an_obstacle():
    whole = model(attention_probs_dropout_prob=0.1)
    before = results(whole, encoder, clips())
    report = accelerate(whole)
    assert not report.replaced
    assert all(
        "attention_probs_dropout_prob must be 0, got 0.1" in reasons
        for reasons in report.left.values()
    )
    assert len(report.left) == 4
    assert "left encoder.layer.0.attention" in str(report)
    assert set(before) == set(results(whole, encoder, clips()))


def test_patch_reaches_models_built_inside():
    modeling = peer("transformers", "transformers.models.vjepa2.modeling_vjepa2")
    original = modeling.VJEPA2RopeAttention.forward
    x = clips()
    whole = model()
    plain = encoder(whole, x)
    with patch("transformers-vjepa2") as names:
        assert "transformers.models.vjepa2.modeling_vjepa2:VJEPA2RopeAttention" in names
        assert modeling.VJEPA2RopeAttention.forward is not original
        fused = encoder(model(), x)
        dropping = model(attention_probs_dropout_prob=0.1)
        kept = encoder(dropping, x)
    assert modeling.VJEPA2RopeAttention.forward is original
    torch.testing.assert_close(fused, plain, **FLOAT32_DEEP)
    assert torch.equal(kept, plain)


def sorted_masked(model, x):
    """Ids in the order of positions, where the original's sorting changes nothing."""
    context, target = torch.arange(8).expand(2, -1), torch.arange(8, 13).expand(2, -1)
    return model(
        pixel_values_videos=x, context_mask=[context], target_mask=[target]
    ).predictor_output.last_hidden_state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", [masked, sorted_masked], ids=["shuffled", "in order"])
def test_unsorted_predictor(call, dtype):
    report = check(model(), call, clips(), dtype, options=("unsorted_predictor",))
    assert "predictor" in report.replaced["transformers-vjepa2"]


def test_unsorted_predictor_of_the_whole_clip_and_undone():
    """Without masks the model predicts every token from every token."""
    whole = model()
    x = clips()
    before = whole(pixel_values_videos=x).predictor_output.last_hidden_state
    accelerate(whole, options=("unsorted_predictor",))
    torch.testing.assert_close(
        whole(pixel_values_videos=x).predictor_output.last_hidden_state,
        before,
        **FLOAT32_DEEP,
    )
    restore(whole)
    assert torch.equal(whole(pixel_values_videos=x).predictor_output.last_hidden_state, before)


def test_unsorted_predictor_never_sorts(monkeypatch):
    whole = model()
    accelerate(whole, options=("unsorted_predictor",))
    monkeypatch.setattr(torch, "argsort", lambda *_, **__: pytest.fail("it sorts"))
    masked(whole, clips())
    restore(whole)
    with pytest.raises(pytest.fail.Exception, match="it sorts"):
        masked(whole, clips())


def context_of(encoder, x, ids):
    """V-JEPA's context encoder, written out: drop tokens ahead of the layers, attend with rotations
    of the kept positions."""
    modeling = peer("transformers", "transformers.models.vjepa2.modeling_vjepa2")
    tokens = torch.stack([clip[kept] for clip, kept in zip(encoder.embeddings(x), ids)])
    for layer in encoder.layer:
        attention, normed = layer.attention, layer.norm1(tokens)
        query, key, value = (
            projection(normed).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for projection in (attention.query, attention.key, attention.value)
        )
        rotated = []
        for x in (query, key):
            parts, first = [], 0
            for position, width in zip(
                (ids // 9, ids % 9 // 3, ids % 3),
                (attention.d_dim, attention.h_dim, attention.w_dim),
            ):
                piece = x[..., first : first + width]
                parts.append(
                    modeling.rotate_queries_or_keys(
                        piece, position[:, None].expand(-1, x.shape[1], -1)
                    )
                )
                first += width
            rotated.append(torch.cat([*parts, x[..., first:]], dim=-1))
        weights = torch.softmax(rotated[0] @ rotated[1].mT * attention.scaling, dim=-1)
        tokens = tokens + attention.proj((weights @ value).transpose(1, 2).flatten(2))
        tokens = tokens + layer.mlp(layer.norm2(tokens))
    return encoder.layernorm(tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_context_alone_against_a_plain_restatement(dtype):
    ids = torch.stack(
        [torch.randperm(18, generator=torch.Generator().manual_seed(seed))[:8] for seed in (3, 4)]
    )
    plain = model().encoder.to(dtype)
    fused = copy.deepcopy(plain)
    accelerate(fused)
    x = clips().to(dtype)
    oracle = results(
        copy.deepcopy(plain).double(), lambda module, x: context_of(module, x, ids), x.double()
    )
    with use_backend("reference" if dtype == torch.float64 else "auto"):
        for encoder in (plain, fused):
            ours = results(encoder, lambda module, x: encode_context(module, x, [ids]), x)
            assert set(ours) == set(oracle)
            for name, value in ours.items():
                assert_within_budget(name, value, oracle[name], gradient=name.startswith("grad"))


def test_context_alone_is_another_function_and_its_predictions_are_the_predictors():
    ids = torch.arange(18).expand(2, -1)
    context, target = ids[:, :8], ids[:, 8:13]
    whole, x = model(), clips()
    accelerate(whole)
    alone = encode_context(whole.encoder, x, [context])
    after = encoder(whole, x)[:, :8]
    assert (alone - after).norm() > 0.01 * after.norm()
    # Without a mask the two are one function.
    torch.testing.assert_close(
        encode_context(whole.encoder, x, [ids]), encoder(whole, x), **FLOAT32_DEEP
    )
    predicted = predict_targets(whole.predictor, after, [context], [target])
    torch.testing.assert_close(predicted, sorted_masked(whole, x), **FLOAT32_DEEP)
