"""The drop-in modules: state dicts of the originals, the published module's numbers, prefix tokens,
packed equals dense."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jepa_kernels.nn import CrossAttention, RoPEAttention
from jepa_kernels.testing import FLOAT32


def loaded(shared_dir, name: str):
    folder = shared_dir / "golden" / "modules"
    weights, data = (
        np.load(folder / f"{n}.npz") for n in (f"{name.rsplit('_', 3)[0]}_weights", name)
    )
    return {k: torch.from_numpy(np.array(v)) for k, v in weights.items()}, {
        k: torch.from_numpy(np.array(v)) for k, v in data.items()
    }


@pytest.mark.parametrize(
    "name",
    ["rope_hd64_sq_full_interp0", "rope_hd32_rect_masked_interp1", "rope_hd64_rect_masked_interp0"],
)
def test_published_module(shared_dir, name):
    weights, data = loaded(shared_dir, name)
    grid = (4, 4, 4) if "_sq_" in name else (3, 3, 5)
    module = RoPEAttention(
        128,
        int(weights["num_heads"]),
        qkv_bias=True,
        layout="interleaved",
        interpolate_from=16 if name.endswith("1") else None,
    )
    renamed = {
        "qkv_w": "qkv.weight",
        "qkv_b": "qkv.bias",
        "proj_w": "proj.weight",
        "proj_b": "proj.bias",
    }
    module.load_state_dict({new: weights[old] for old, new in renamed.items()})
    assert list(module.state_dict()) == list(renamed.values())
    x = data["x"].clone().requires_grad_()
    out = module(x, mask=data["ids"], T=grid[0], H_patches=grid[1], W_patches=grid[2])
    (out * data["cotangent"]).sum().backward()
    results = {
        "out": out,
        "grad_x": x.grad,
        **{f"grad_{old}": module.get_parameter(new).grad for old, new in renamed.items()},
    }
    for key, value in results.items():
        assert (value.double() - data[key].double()).norm() <= FLOAT32["rtol"] * data[
            key
        ].double().norm(), key


def test_a_whole_grid_needs_no_mask():
    module = RoPEAttention(48, 2, layout="tiled", grid_size=3)
    x = torch.randn(2, 18, 48)
    whole = module(x)
    torch.testing.assert_close(
        whole, module(x, mask=torch.arange(18), T=2, H_patches=3, W_patches=3)
    )
    torch.testing.assert_close(whole, module(x, mask=torch.arange(18).expand(2, -1)))


def test_prefix_and_suffix_tokens_are_not_rotated():
    """A class token and registers around the patches equal id -1 in the packed call."""
    module = RoPEAttention(48, 2, layout="interleaved", grid_size=3, num_prefix=1, num_suffix=2)
    x = torch.randn(2, 12, 48)
    ids = torch.cat((torch.full((1,), -1), torch.arange(9), torch.full((2,), -1)))
    packed = module(x.flatten(0, 1), mask=ids.repeat(2), T=1, cu_seqlens=torch.tensor([0, 12, 24]))
    torch.testing.assert_close(module(x).flatten(0, 1), packed, **FLOAT32)


def test_cross_attention_packed_equals_dense():
    module = CrossAttention(64, 4, qkv_bias=True)
    assert list(module.state_dict()) == ["q.weight", "q.bias", "kv.weight", "kv.bias"]
    q, x = torch.randn(2, 3, 64), torch.randn(2, 7, 64)
    dense = module(q, x)
    packed = module(
        q.flatten(0, 1), x.flatten(0, 1), torch.tensor([0, 3, 6]), torch.tensor([0, 7, 14])
    )
    torch.testing.assert_close(dense.flatten(0, 1), packed, **FLOAT32)
    scores = torch.einsum(
        "bqhd,bkhd->bhqk",
        module.q(q).unflatten(-1, (4, 16)),
        module.kv(x).unflatten(-1, (2, 4, 16))[:, :, 0],
    )
    value = module.kv(x).unflatten(-1, (2, 4, 16))[:, :, 1]
    expected = torch.einsum("bhqk,bkhd->bqhd", (scores / 4).softmax(-1), value).flatten(-2)
    torch.testing.assert_close(dense, expected, **FLOAT32)


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(ValueError, match="attn_drop must be 0"):
        RoPEAttention(48, 2, attn_drop=0.1, layout="tiled")
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads"):
        RoPEAttention(50, 4, layout="tiled")
    with pytest.raises(TypeError, match="layout"):
        RoPEAttention(48, 2)
    module = RoPEAttention(48, 2, layout="tiled")
    with pytest.raises(ValueError, match="attn_mask must be None"):
        module(torch.randn(1, 4, 48), attn_mask=torch.ones(4, 4))
    with pytest.raises(TypeError, match="mask must be given with cu_seqlens"):
        module(torch.randn(4, 48), cu_seqlens=torch.tensor([0, 4]))
