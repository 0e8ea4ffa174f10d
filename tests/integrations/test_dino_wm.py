"""DINO-WM's predictor, which no package holds: its layout written anew against itself with fused
attention."""

from __future__ import annotations

import pytest
import torch

from jepa_kernels.integrations import accelerate, restore
from jepa_kernels.testing import FLOAT32_DEEP
from tests.integrations.peers import DTYPES, check, randomised, steps_apart
from tests.integrations.restated import ViTPredictor
from tests.integrations.test_docs_pages import blocks


def predictor(**changes):
    sizes = dict(num_patches=20, num_frames=3, dim=40, depth=2, heads=2)
    return randomised(ViTPredictor(**(sizes | changes)))


def call(model, x):
    return model(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_outputs_and_gradients(frames, dtype):
    """Its window of frames is the length of its mask: histories are at most that long."""
    report = check(predictor(), call, torch.randn(2, 20 * frames, 40), dtype)
    assert report.replaced == {"dino-wm": ["layers.0.0", "layers.1.0"]}


def test_frames_that_are_not_whole():
    check(predictor(), call, torch.randn(2, 33, 40), torch.float32)


def test_ten_steps_stay_together():
    assert steps_apart(predictor().train(), call, torch.randn(2, 60, 40)) < FLOAT32_DEEP["rtol"]


def test_a_mask_of_another_kind_stays():
    model = predictor()
    model.layers[1][0].bias = model.layers[1][0].bias.triu(-1)
    report = accelerate(model)
    assert report.replaced == {"dino-wm": ["layers.0.0"]}
    assert report.left == {
        "layers.1.0": ["its mask must let every frame see itself and all earlier ones"]
    }


def test_dropout_runs_the_original_in_training_alone(monkeypatch):
    calls = []

    def attention(query, key, value, **options):
        calls.append(options)
        return value

    monkeypatch.setattr("jepa_kernels.integrations.dino_wm.masked_attention", attention)
    model, x = predictor(dropout=0.1), torch.randn(1, 40, 40)
    accelerate(model)
    model.train()(x)
    assert not calls
    model.eval()(x)
    assert len(calls) == 2


def test_compiled():
    model, x = predictor(), torch.randn(1, 40, 40)
    accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), **FLOAT32_DEEP)


def test_longer_histories_than_the_mask_are_the_originals_to_refuse():
    model = predictor()
    attention, x = model.layers[0][0], torch.randn(1, 61, 40)
    accelerate(model)
    with pytest.raises(RuntimeError, match="61"):
        attention(x)
    assert restore(model) == 2
    with pytest.raises(RuntimeError, match="61"):
        attention(x)


def test_the_recipe_of_its_page(root):
    """A window of frames by time, against SDPA with the dense mask."""
    given = {}
    exec(blocks(root, "dino-wm")[2], given)
    patches, frames = given["patches"], given["frames"]
    seen = torch.ones(frames, frames).tril().triu(1 - given["window"])
    mask = torch.kron(seen, torch.ones(patches, patches)) > 0
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(given[name].transpose(1, 2) for name in "qkv"), attn_mask=mask
    )
    torch.testing.assert_close(given["out"], dense.transpose(1, 2), **FLOAT32_DEEP)
