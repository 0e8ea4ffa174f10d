"""Encoder and predictor: packed equals one sequence at a time, any grid, public weights, nothing
computed that is not asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from jepa.batch import MaskBatch
from jepa.config import ConfigError
from jepa.models.blocks import set_attention_backend
from jepa.models.encoder import Encoder
from jepa.models.patches import CHANNEL_MEAN, CHANNEL_STD, clip_grid, patch_means
from jepa.models.predictor import JointOrder, Predictor
from jepa.models.sizes import DEFAULT_SIZE, SIZES, PredictorConfig, model_config, parse_model
from jepa_kernels.testing import (
    DERIVED,
    DRAWN_DEVIATION,
    FLOAT32_CANCELLING,
    FLOAT32_DEEP,
    FLOAT32_NEAR_ZERO,
    NOMINAL,
)
from tests.jepa.training_cases import make_batch, ragged_masks, random_bytes, small_model

GRIDS = [(4, 3, 5), (3, 4, 2), (1, 4, 5), (2, 1, 6)]


def encoder(**changes) -> Encoder:
    torch.manual_seed(0)
    model = Encoder(small_model(**changes))
    # Residual branches start at 2 % of the stream: without this, positions and attention would
    # hardly show.
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(20)
    return model


def normalised(clips: torch.Tensor) -> torch.Tensor:
    scaled = (clips.float() / 255 - torch.tensor(CHANNEL_MEAN)) / torch.tensor(CHANNEL_STD)
    return scaled.permute(0, 4, 1, 2, 3).contiguous()


@pytest.mark.parametrize("grid", GRIDS)
def test_packed_equals_one_sequence_at_a_time(grid):
    batch = make_batch(grid, 3)
    model, masks = encoder(), ragged_masks(grid, 3)
    packed = model(batch.clips, masks)
    assert packed.shape == (masks.context_ids.shape[0], 48)
    for s in range(masks.num_sets * 3):
        first, last = int(masks.context_cu[s]), int(masks.context_cu[s + 1])
        ids = masks.context_ids[first:last].numpy()
        alone = MaskBatch.from_ids([[ids]], [[np.zeros(0, np.int64)]], grid)
        b = s % 3
        torch.testing.assert_close(
            model(batch.clips[b : b + 1], alone), packed[first:last], **FLOAT32_DEEP
        )


def test_all_tokens_equal_a_full_mask_and_the_last_level_is_the_last():
    batch = make_batch((2, 3, 4), 2)
    model = encoder()
    every = [[np.arange(24)] * 2]
    full = MaskBatch.from_ids(every, [[np.zeros(0, np.int64)] * 2], (2, 3, 4))
    dense = model(batch.clips)
    torch.testing.assert_close(model(batch.clips, full).view(2, 24, -1), dense, **FLOAT32_DEEP)
    torch.testing.assert_close(model(batch.clips, levels="last"), dense[..., 24:])


def test_order_of_tokens_does_not_matter_and_ids_do():
    batch = make_batch((4, 3, 5), 1)
    model = encoder()
    ids = np.random.default_rng(0).permutation(60)[:20]
    empty = [[np.zeros(0, np.int64)]]
    first = model(batch.clips, MaskBatch.from_ids([[ids]], empty, (4, 3, 5)))
    order = np.random.default_rng(1).permutation(20)
    second = model(batch.clips, MaskBatch.from_ids([[ids[order]]], empty, (4, 3, 5)))
    torch.testing.assert_close(second, first[order], **FLOAT32_DEEP)
    same = dataclasses.replace(batch, clips=torch.full_like(batch.clips, 7))
    third = model(same.clips, MaskBatch.from_ids([[ids]], empty, (4, 3, 5)))
    # Equal pixels: rotary positions move attention weights, not values.
    assert (third[0] - third[1]).abs().max() < FLOAT32_CANCELLING["atol"]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_causal_encoder_sees_no_later_step(steps):
    """The features of the first steps are those of a shorter clip, and no later pixel changes
    them; a single step is all that an encoder of whole clips would see, too."""
    model, clips = encoder(causal=True), random_bytes((4, 3, 5), 2)
    whole = model(clips)
    prefix = model(clips[:, : 2 * steps])
    torch.testing.assert_close(whole[:, : steps * 15], prefix, **FLOAT32_DEEP)
    changed = clips.clone()
    changed[:, 2 * steps :] = 255 - changed[:, 2 * steps :]
    assert torch.equal(model(changed)[:, : steps * 15], whole[:, : steps * 15])
    both_ways = encoder()
    assert not torch.allclose(both_ways(clips)[:, : steps * 15], prefix, **DERIVED)
    if steps == 1:
        torch.testing.assert_close(both_ways(clips[:, :2]), prefix, **FLOAT32_DEEP)


def test_a_causal_encoder_of_visible_tokens():
    """Packed, by mask: a later visible token changes nothing at an earlier one."""
    batch, grid = make_batch((4, 3, 5), 1), (4, 3, 5)
    model, empty = encoder(causal=True), [[np.zeros(0, np.int64)]]
    ids = np.array([50, 3, 17, 31, 8, 40])  # steps 3, 0, 1, 2, 0, 2
    all_of_them = model(batch.clips, MaskBatch.from_ids([[ids]], empty, grid))
    early = model(batch.clips, MaskBatch.from_ids([[ids[[1, 2, 4]]]], empty, grid))
    torch.testing.assert_close(all_of_them[[1, 2, 4]], early, **FLOAT32_DEEP)
    assert not torch.allclose(
        all_of_them[[3, 5]],
        model(batch.clips, MaskBatch.from_ids([[ids[[3, 5]]]], empty, grid)),
        **DERIVED,
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("frames", [1, 4])
def test_patches_equal_a_convolution(dtype, frames):
    grid = (1, 2, 3) if frames == 1 else (2, 2, 3)
    given = random_bytes(grid, 2) if dtype == torch.uint8 else make_batch(grid, 2).clips
    assert clip_grid(given, 2, 16) == grid
    model = encoder()
    embed = model.patch_embed_img if frames == 1 else model.patch_embed
    clips = normalised(given) if dtype == torch.uint8 else given
    expected = embed.proj(clips).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(embed(given).flatten(0, 1), expected, **FLOAT32_CANCELLING)
    ids, cu_seqlens = torch.tensor([0, 5, 3, 4, 5, 2]), torch.tensor([0, 2, 3, 5, 6])
    rows = ids + torch.tensor([0, 0, 1, 0, 0, 1]) * (len(expected) // 2)  # sets of two clips
    torch.testing.assert_close(embed(given, ids, cu_seqlens), expected[rows], **FLOAT32_CANCELLING)
    means = (
        functional.avg_pool3d(clips, (1 if frames == 1 else 2, 16, 16))
        .flatten(2)
        .transpose(1, 2)
        .flatten(0, 1)
    )
    torch.testing.assert_close(patch_means(given, 2, 16), means, **FLOAT32_CANCELLING)


def test_bad_clips_and_masks_are_refused():
    model = encoder()
    with pytest.raises(
        ValueError,
        match=r"clips must be uint8 \[B, frames, H, W, 3\] or float \[B, 3, frames, H, W\], got "
        r"torch.uint8",
    ):
        model(torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8))
    with pytest.raises(
        ValueError,
        match="a multiple of 2 frames and sides that are multiples of 16, got 3 frames of 32 x 32",
    ):
        model(torch.zeros(2, 3, 3, 32, 32))
    with pytest.raises(ValueError, match=r"masks must be for 2 clips of grid \(2, 2, 2\)"):
        model(torch.zeros(2, 3, 4, 32, 32), ragged_masks((4, 3, 5), 2))


def test_images_and_videos_train_their_own_parameters():
    model = encoder()
    image, video = make_batch((1, 2, 3), 2, seed=1), make_batch((2, 2, 3), 2, seed=1)
    model(image.clips).sum().backward()
    assert model.patch_embed_img.proj.weight.grad is not None
    assert model.img_mod_embed.grad is not None
    assert model.patch_embed.proj.weight.grad is None
    model.zero_grad()
    model(video.clips).sum().backward()
    assert model.patch_embed_img.proj.weight.grad is None
    assert model.video_mod_embed.grad is not None


def test_two_frames_are_a_video():
    clips = make_batch((2, 2, 3), 2).clips[:, :, :2]
    model = encoder()
    model(clips).sum().backward()
    assert model.patch_embed.proj.weight.grad is not None


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_predictor_packed_equals_one_sequence_at_a_time(grid, shared):
    torch.manual_seed(0)
    predictor, masks = Predictor(small_model(), shared_mask_token=shared), ragged_masks(grid, 3)
    for index, token in enumerate(predictor.mask_tokens):
        token.data.fill_(1.0 + index)
    for block in predictor.predictor_blocks:
        block.attn.qkv.weight.data.mul_(20)
    x = torch.randn(masks.context_ids.shape[0], 48)
    predicted, context = predictor(x, masks)
    for s in range(masks.num_sets * 3):
        rows = [slice(int(cu[s]), int(cu[s + 1])) for cu in (masks.context_cu, masks.target_cu)]
        ids = [
            values[row].numpy()
            for values, row in zip((masks.context_ids, masks.target_ids), rows, strict=True)
        ]
        # As the j-th of two sets, so that it gets the j-th mask token.
        empty = np.zeros(0, np.int64)
        places = [[ids[0]], [empty]], [[ids[1]], [empty]]
        alone = MaskBatch.from_ids(*(p[::-1] if s >= 3 else p for p in places), grid)
        one_predicted, one_context = predictor(x[rows[0]], alone)
        torch.testing.assert_close(one_predicted, predicted[rows[1]], **FLOAT32_DEEP)
        torch.testing.assert_close(one_context, context[rows[0]], **FLOAT32_DEEP)
    assert predictor(x, masks, predict_context=False)[1] is None


def test_mask_tokens_per_set_all_train_and_shared_ones_do_not():
    masks = ragged_masks()
    x = torch.randn(masks.context_ids.shape[0], 48)
    model = small_model(predictor=PredictorConfig(width=16, depth=1, heads=2, mask_tokens=3))
    for shared, trained in ((True, [True, False, False]), (False, [True, True, False])):
        predictor = Predictor(model, shared_mask_token=shared)
        predictor(x, masks)[0].sum().backward()
        assert [token.grad is not None for token in predictor.mask_tokens] == trained


def test_joint_order_interleaves_each_sequence():
    masks = MaskBatch.from_ids(
        [[np.array([5, 1]), np.array([2])]], [[np.array([0]), np.array([9, 7, 3])]], (1, 2, 5)
    )
    order = JointOrder.of(masks)
    assert order.ids.tolist() == [5, 1, 0, 2, 9, 7, 3]
    assert order.cu_seqlens.tolist() == [0, 3, 7]
    assert order.context_rows.tolist() == [0, 1, 3]
    assert order.target_rows.tolist() == [2, 4, 5, 6]


def test_empty_sequences():
    empty = np.zeros(0, np.int64)
    masks = MaskBatch.from_ids([[np.array([1, 2]), empty]], [[empty, np.array([0, 3])]], (1, 2, 2))
    batch = make_batch((1, 2, 2), 2)
    features = encoder()(batch.clips, masks)
    predicted, context = Predictor(small_model())(features, masks, image=True)
    assert predicted.shape == (2, 48)
    assert context.shape == (2, 48)
    assert torch.isfinite(predicted).all()
    (predicted.sum() + context.sum()).backward()


def test_checkpointing_changes_nothing_but_memory():
    batch, masks = make_batch((2, 2, 3), 2), ragged_masks((2, 2, 3), 2)
    gradients = []
    for save in (False, True):
        model = encoder(checkpoint_activations=save)
        model(batch.clips, masks).square().sum().backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


def test_public_state_dicts_load_with_and_without_prefixes():
    source, target = encoder(), Encoder(small_model())
    wrapped = {f"module.backbone.{key}": value for key, value in source.state_dict().items()}
    target.load_public(wrapped)
    assert all(
        torch.equal(a, b)
        for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    wrapped["module.backbone.pos_embed"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="pos_embed"):
        target.load_public(wrapped)


def test_one_model_takes_any_resolution():
    model = encoder()
    for grid in GRIDS:
        assert model(make_batch(grid, 1).clips).shape == (1, int(np.prod(grid)), 48)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_forced_backend_reaches_every_block(backend):
    batch, masks = make_batch((2, 2, 3), 2), ragged_masks((2, 2, 3), 2)
    model = encoder()
    default = model(batch.clips, masks)
    set_attention_backend(model, backend)
    torch.testing.assert_close(model(batch.clips, masks), default, **FLOAT32_DEEP)


def test_compiles_without_graph_breaks():
    batch, masks = make_batch((2, 2, 3), 2), ragged_masks((2, 2, 3), 2)
    model = encoder()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager, traced = model(batch.clips, masks), compiled(batch.clips, masks)
    torch.testing.assert_close(traced, eager, **FLOAT32_DEEP)
    traced.sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None


PARAMETERS = {
    "micro": 0.6e6,
    "tiny": 5.9e6,
    "small": 22e6,
    "base": 86e6,
    "large": 304e6,
    "giant": 1.01e9,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    config = SIZES[name]
    with torch.device("meta"):
        model, predictor = Encoder(config), Predictor(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(PARAMETERS[name], rel=NOMINAL["rtol"])
    assert config.feature_width == 4 * config.width
    assert predictor.predictor_proj.out_features == config.feature_width
    assert len(model.norms_block) == 4
    if name == "giant":
        assert model.blocks[0].mlp.fc1.out_features == 6144


def test_size_configuration_is_strict():
    assert parse_model({"size": "micro", "predictor": {"depth": 1}}, "model").predictor.depth == 1
    assert parse_model("base", "model") == SIZES["base"]
    assert parse_model({"mlp_ratio": 2.0}, "model") == model_config(DEFAULT_SIZE, mlp_ratio=2.0)
    with pytest.raises(ConfigError, match="unknown model size 'bse'; did you mean 'base'"):
        model_config("bse")
    with pytest.raises(ConfigError, match=r"unknown key 'model.widht'; did you mean 'width'"):
        model_config("tiny", widht=3)
    with pytest.raises(ConfigError, match="width must be a multiple of heads"):
        model_config("tiny", heads=5)
    with pytest.raises(ConfigError, match="level_blocks must rise and end at the last block"):
        model_config("tiny", depth=6)


def test_initial_weights_follow_the_published_rule():
    torch.manual_seed(0)
    model = Encoder(model_config("micro"))
    assert float(model.blocks[0].attn.qkv.weight.detach().std()) == pytest.approx(
        0.02, rel=DRAWN_DEVIATION["rtol"]
    )
    assert float(model.blocks[3].mlp.fc2.weight.detach().std()) == pytest.approx(
        0.02 / 8**0.5, rel=DRAWN_DEVIATION["rtol"]
    )
    assert model.video_mod_embed.detach().abs().max() < FLOAT32_NEAR_ZERO["atol"]
    assert all((token == 0).all() for token in Predictor(model_config("micro")).mask_tokens)
