"""Hugging Face I-JEPA with fused attention against the untouched model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from jepa_kernels.integrations import accelerate, patch, restore
from jepa_kernels.testing import DERIVED, FLOAT32_DEEP
from tests.integrations.peers import DTYPES, check, peer, randomised, steps_apart


def model(kind: str = "IJepaModel", **changes):
    modeling = peer("transformers", "transformers.models.ijepa.modeling_ijepa")
    from transformers import IJepaConfig

    sizes = dict(
        image_size=12,
        patch_size=4,
        hidden_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=96,
    )
    drop = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return randomised(
        getattr(modeling, kind)(
            IJepaConfig(**(sizes | drop | dict(attn_implementation="sdpa") | changes))
        )
    )


def features(model, x):
    return model(pixel_values=x).last_hidden_state


# The written-out softmax of transformers is float32 whatever the model is.
@pytest.mark.parametrize(
    "implementation, dtype",
    [*(("sdpa", dtype) for dtype in DTYPES), ("eager", torch.float32), ("eager", torch.bfloat16)],
    ids=str,
)
def test_encoder(implementation, dtype):
    report = check(
        model(attn_implementation=implementation), features, torch.randn(2, 3, 12, 12), dtype
    )
    assert len(report.replaced["transformers-ijepa"]) == 2


def test_classifier():
    check(
        model("IJepaForImageClassification", num_labels=3),
        lambda m, x: m(pixel_values=x).logits,
        torch.randn(2, 3, 12, 12),
        torch.float32,
    )


def test_not_square():
    """The original interpolates its learned positions."""
    call = lambda m, x: m(pixel_values=x, interpolate_pos_encoding=True).last_hidden_state  # noqa: E731
    check(model(), call, torch.randn(1, 3, 8, 20), torch.float64)


def test_ten_steps_stay_together():
    assert steps_apart(model().train(), features, torch.randn(2, 3, 12, 12)) < FLOAT32_DEEP["rtol"]


def test_dropout_is_an_obstacle():
    report = accelerate(model(attention_probs_dropout_prob=0.1))
    assert not report.replaced
    assert {tuple(reasons) for reasons in report.left.values()} == {
        ("attention_probs_dropout_prob must be 0, got 0.1",)
    }


def test_masks_are_served_by_the_original():
    x, masked = torch.randn(2, 3, 12, 12), torch.ones(2, 9, dtype=torch.long)
    masked[:, 5:] = 0
    made = model().eval()
    call = lambda: made(pixel_values=x, attention_mask=masked).last_hidden_state  # noqa: E731
    before, unmasked = call(), features(made, x)
    assert not torch.allclose(before, unmasked, **DERIVED)
    accelerate(made)
    assert torch.equal(call(), before)
    restore(made)
    with patch("transformers-ijepa"):
        assert torch.equal(call(), before)
        assert torch.allclose(features(made, x), unmasked, **FLOAT32_DEEP)


def test_attention_weights_are_an_obstacle():
    report = accelerate(model(output_attentions=True, attn_implementation="eager"))
    assert not report.replaced
    assert "config.output_attentions must be False" in str(report)


def test_attention_weights_of_one_call_are_served_by_the_original():
    torch.manual_seed(3)
    x, made = torch.randn(2, 3, 12, 12), model(attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = made(x, output_attentions=True)
        accelerate(made)
        got = made(x, output_attentions=True)
    assert len(got.attentions) == len(wanted.attentions) > 0
    for ours, theirs in zip(got.attentions, wanted.attentions, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(got.last_hidden_state, wanted.last_hidden_state)


def test_an_accelerated_model_can_be_pickled_and_copied():
    x, made = torch.randn(1, 3, 12, 12), model().eval()
    accelerate(made)
    wanted = features(made, x)
    copied = copy.deepcopy(made)
    with torch.no_grad():
        made.layers[0].attention.q_proj.weight.zero_()
    assert torch.equal(features(copied, x), wanted)
    assert torch.equal(features(pickle.loads(pickle.dumps(copied)), x), wanted)
