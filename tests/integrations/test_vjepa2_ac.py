"""The action-conditioned predictor of V-JEPA 2: the published one where cc-vjepa2 is installed, and
its layout written anew, against themselves with fused attention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jepa_kernels.integrations import accelerate, patch, restore
from jepa_kernels.integrations.frame_causal import FrameCausalMask, tokens_per_frame
from jepa_kernels.testing import FLOAT32_DEEP
from tests.integrations import restated
from tests.integrations.peers import check, peer, randomised, results, steps_apart

SIZES = dict(
    img_size=(12, 12),
    patch_size=4,
    num_frames=8,
    tubelet_size=2,
    embed_dim=20,
    predictor_embed_dim=48,
    depth=2,
    num_heads=2,
)


def predictor(source: str, **changes):
    module = restated
    if source == "published":
        module = peer("vjepa2", "vjepa2.models.ac_predictor")
    return randomised(module.VisionTransformerPredictorAC(**(SIZES | changes)))


@pytest.fixture(params=["restated", "published"])
def source(request):
    return request.param


def tokens(frames: int = 4, spatial: int = 9):
    return torch.randn(2, frames * spatial, 20)


def call(model, x):
    """Actions, states and extrinsics of fixed numbers, in the dtype of the tokens."""
    spatial = model.grid_height * model.grid_width
    generator = torch.Generator().manual_seed(5)
    shape = x.shape[0], x.shape[1] // spatial
    actions, states = (torch.randn(*shape, 7, generator=generator).to(x.dtype) for _ in range(2))
    extrinsics = torch.randn(*shape, 6, generator=generator).to(x.dtype)
    return model(x, actions, states, extrinsics)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("extrinsics", [False, True], ids=["two", "three"])
def test_outputs_and_gradients(source, extrinsics, dtype):
    model = predictor(source, use_extrinsics=extrinsics)
    report = check(model, call, tokens(), dtype)
    assert report.replaced == {"vjepa2-ac": [f"predictor_blocks.{i}.attn" for i in range(2)]}
    assert not report.left


@pytest.mark.parametrize("frames", [1, 3])
def test_a_prefix_of_the_frames(source, frames):
    check(predictor(source), call, tokens(frames), torch.float32)


def test_frames_that_are_not_square(source):
    """Columns are scaled by the rows of the grid over its columns."""
    model = predictor(source, img_size=(8, 20))
    check(model, call, tokens(spatial=10), torch.float32)


def test_under_autocast_no_worse_than_the_original(source):
    """The published module makes its angles in the dtype of the queries; the op makes them in
    float32."""
    x, model = tokens(), predictor(source)
    oracle = results(copy.deepcopy(model).double(), call, x.double())

    def in_bfloat16(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return call(model, x).float()

    theirs = results(model, in_bfloat16, x)
    accelerate(model)
    ours = results(model, in_bfloat16, x)

    def error(values):
        return sum(
            float((values[name] - oracle[name]).norm() / oracle[name].norm())
            for name in ("out", "grad input")
        )

    assert 0 < error(ours) < 1.25 * error(theirs)


def test_ten_steps_stay_together(source):
    assert steps_apart(predictor(source).train(), call, tokens()) < FLOAT32_DEEP["rtol"]


def test_a_later_frame_changes_nothing_earlier(source):
    model, x = predictor(source), tokens()
    accelerate(model)
    changed = x.clone()
    changed[:, 27:] += 1.0
    before, after = call(model, x), call(model, changed)
    assert torch.equal(before[:, :27], after[:, :27])
    assert not torch.equal(before[:, 27:], after[:, 27:])


class LargestBool(TorchDispatchMode):
    """Records the elements of the largest bool tensor that any operation gives or takes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool:
                self.elements = max(self.elements, leaf.numel())
        return result


def largest_mask(model, x, monkeypatch) -> int:
    """Of a step, with the attention itself replaced: what a backend does inside is its own."""

    def attention(query, key, value, *, query_times, key_times, **options):
        assert query_times.shape == key_times.shape == (query.shape[1],)
        return query + key + value

    monkeypatch.setattr("jepa_kernels.integrations.vjepa2_ac.masked_attention", attention)
    with LargestBool() as seen:
        call(model, x.requires_grad_()).square().mean().backward()
    return seen.elements


def test_the_dense_mask_is_never_formed(source, monkeypatch):
    x = tokens()
    count = 4 * (2 + 9)
    model = predictor(source)
    assert model.attn_mask.shape == (count, count)
    assert largest_mask(model, x, monkeypatch) >= count**2
    accelerate(model)
    assert isinstance(model.attn_mask, FrameCausalMask)
    monkeypatch.setattr(FrameCausalMask, "dense", None)
    assert largest_mask(model, x, monkeypatch) < count**2 // 8


def test_patch_builds_predictors_without_a_mask(monkeypatch):
    published = peer("vjepa2", "vjepa2.models.ac_predictor")
    builder = published.build_action_block_causal_attention_mask
    x = tokens()
    plain = call(predictor("published"), x)
    with patch("vjepa2-ac") as names, LargestBool() as seen:
        model = predictor("published")
        assert isinstance(model.attn_mask, FrameCausalMask)
        assert seen.elements < 44**2 // 8
    assert names == ["vjepa2.models.utils.modules:ACRoPEAttention"]
    assert published.build_action_block_causal_attention_mask is builder
    with patch("vjepa2-ac"):
        torch.testing.assert_close(call(model, x), plain, **FLOAT32_DEEP)
    # Its own forward goes on with the object in place of the mask.
    assert torch.equal(call(model, x), plain)


def test_restore_gives_the_mask_back(source):
    model, x = predictor(source), tokens()
    mask, before = model.attn_mask.clone(), call(model, x)
    accelerate(model)
    accelerate(model)
    assert restore(model) == 2
    assert torch.equal(model.attn_mask, mask)
    assert torch.equal(call(model, x), before)


def test_modules_that_keep_their_forward_get_the_dense_mask(source):
    model, x = predictor(source), tokens()
    before = call(model, x)
    model.predictor_blocks[1].attn.proj_drop_prob = 0.1
    report = accelerate(model)
    assert report.left == {"predictor_blocks.1.attn": ["proj_drop must be 0, got 0.1"]}
    torch.testing.assert_close(call(model, x), before, **FLOAT32_DEEP)


def test_a_mask_of_another_kind_stays(source):
    """A window of two frames is not what the object stands for: the attention runs as it is."""
    model, x = predictor(source), tokens()
    model.attn_mask = model.attn_mask & ~torch.ones_like(model.attn_mask).tril(-2 * 11)
    before = call(model, x)
    report = accelerate(model)
    assert report.left == {"": ["its attn_mask is another mask than the fused op has"]}
    assert torch.equal(call(model, x), before)


def test_an_attention_alone_takes_any_mask(source):
    model = predictor(source)
    attention, x = model.predictor_blocks[0].attn, torch.randn(1, 22, 48)
    sizes = dict(T=2, H=3, W=3, action_tokens=2)
    mask = torch.ones(22, 22, dtype=torch.bool).tril()
    plain = attention(x, attn_mask=mask, **sizes)
    accelerate(attention)
    assert torch.equal(attention(x, attn_mask=mask, **sizes), plain)


def test_compiled(source):
    model, x = predictor(source), tokens()
    accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(compiled, x), call(model, x), **FLOAT32_DEEP)


def test_blocks_without_positions():
    """Its plain attention takes the object too; masks of its own it refuses, as ever."""
    published = peer("vjepa2", "vjepa2.models.ac_predictor")
    model = randomised(published.VisionTransformerPredictorAC(**SIZES, use_rope=False))
    report = check(model, call, tokens(), torch.float32)
    assert report.replaced == {"vjepa2": [f"predictor_blocks.{i}.attn" for i in range(2)]}


def test_the_stand_in_answers_as_the_mask_does():
    mask = restated.build_action_block_causal_attention_mask(3, 1, 2, add_tokens=1)
    stand_in = FrameCausalMask(3, 3)
    assert torch.equal(stand_in.dense(), mask)
    for same in (pickle.loads(pickle.dumps(stand_in)), copy.deepcopy(stand_in)):
        assert torch.equal(same.dense(), mask)
    for length in (0, 5, 9, 12):
        part = stand_in[:length, :length]
        assert isinstance(part, FrameCausalMask) and part.shape == mask[:length, :length].shape
        assert torch.equal(part.to("cpu", non_blocking=True).dense(), mask[:length, :length])
    assert torch.equal(stand_in[2], mask[2])
    assert torch.equal(stand_in[1:, :4], mask[1:, :4])
    assert torch.equal(stand_in[:-2, :-2], mask[:-2, :-2])
    assert torch.equal(torch.logical_not(stand_in), ~mask)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.ones(4, 4), 4),
        (torch.ones(4, 4).tril(), 1),
        (torch.ones(4, 4).tril()[None, None], 1),
        (torch.kron(torch.ones(2, 2).tril(), torch.ones(3, 3)), 3),
        (torch.kron(torch.ones(3, 3).tril().triu(-1), torch.ones(2, 2)), None),
        (torch.ones(4, 4).triu(), None),
        (torch.zeros(4, 4), None),
        (torch.ones(4, 6), None),
        (torch.ones(0, 0), None),
        (torch.ones(2, 4, 4), None),
    ],
)
def test_what_is_frame_causal(mask, expected):
    assert tokens_per_frame(mask) == expected
