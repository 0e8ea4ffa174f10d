"""V-JEPA 2.1's modules, which no package holds: a module of their name, parameters and attributes
against the published module's numbers."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from jepa_kernels import nn as drop_in
from jepa_kernels.integrations import accelerate, patch
from jepa_kernels.testing import FLOAT32

_PATH = "app.vjepa_2_1.models.utils.modules"


class RoPEAttention(nn.Module):
    """What accelerate sees of the public class; its own forward is not called."""

    def __init__(
        self,
        dim,
        num_heads,
        grid_size=4,
        interpolate_rope=False,
        n_registers=0,
        has_cls_first=False,
        drop=0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.grid_size = num_heads, grid_size
        self.scale, self.use_sdpa, self.is_causal = (dim // num_heads) ** -0.5, True, False
        self.interpolate_rope, self.pretrained_grid_size = interpolate_rope, 16
        self.n_registers, self.has_cls_first = n_registers, has_cls_first
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop, self.proj_drop_prob = (
            nn.Dropout(0.0),
            nn.Dropout(drop),
            drop,
        )

    def forward(self, x, mask=None, T=None, H_patches=None, W_patches=None, return_attn=False):
        raise NotImplementedError("the fused forward takes this one's place")


RoPEAttention.__module__ = _PATH


def loaded(path):
    with np.load(path) as arrays:
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


@pytest.mark.parametrize("interpolated", [0, 1])
@pytest.mark.parametrize("tokens", ["full", "masked"])
@pytest.mark.parametrize("shape", ["sq", "rect"])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_published_module(shared_dir, head_dim, shape, tokens, interpolated):
    folder = shared_dir / "golden" / "modules"
    weights, data = (
        loaded(folder / f"rope_hd{head_dim}_weights.npz"),
        loaded(folder / f"rope_hd{head_dim}_{shape}_{tokens}_interp{interpolated}.npz"),
    )
    module = RoPEAttention(128, int(weights["num_heads"]), interpolate_rope=bool(interpolated))
    names = {
        "qkv_w": "qkv.weight",
        "qkv_b": "qkv.bias",
        "proj_w": "proj.weight",
        "proj_b": "proj.bias",
    }
    module.load_state_dict({new: weights[old] for old, new in names.items()})
    assert accelerate(module).replaced == {"vjepa2.1": [""]}
    grid = (4, 4, 4) if shape == "sq" else (3, 3, 5)
    x = data["x"].clone().requires_grad_()
    mask = data["ids"] if tokens == "masked" else None
    out, probabilities = module(x, mask=mask, T=grid[0], H_patches=grid[1], W_patches=grid[2])
    assert probabilities is None
    (out * data["cotangent"]).sum().backward()
    results = {
        "out": out,
        "grad_x": x.grad,
        **{f"grad_{old}": module.get_parameter(new).grad for old, new in names.items()},
    }
    for name, value in results.items():
        expected = data[name].double()
        assert (value.double() - expected).norm() <= FLOAT32["rtol"] * expected.norm(), name


@pytest.mark.parametrize("masked", [False, True])
def test_class_token_and_registers_are_not_rotated(masked):
    module = RoPEAttention(
        48, 2, grid_size=3, interpolate_rope=True, n_registers=2, has_cls_first=True
    )
    ours = drop_in.RoPEAttention(
        48,
        2,
        qkv_bias=True,
        layout="interleaved",
        grid_size=3,
        interpolate_from=16,
        num_prefix=1,
        num_suffix=2,
    )
    ours.load_state_dict(module.state_dict())
    accelerate(module)
    mask = torch.stack([torch.randperm(18)[:7] for _ in range(2)]) if masked else None
    x = torch.randn(2, 10 if masked else 21, 48)
    torch.testing.assert_close(module(x, mask=mask)[0], ours(x, mask=mask))


def test_obstacles():
    report = accelerate(nn.ModuleList([RoPEAttention(48, 2, drop=0.1)]))
    assert report.left == {"0": ["proj_drop must be 0, got 0.1"]}
    plain = RoPEAttention(48, 2)
    plain.use_sdpa = False
    accelerate(plain)
    with pytest.raises(ValueError, match="return_attn must be False"):
        plain(torch.randn(1, 16, 48), return_attn=True)


def test_patch_finds_the_class_by_its_path(monkeypatch):
    parts = _PATH.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(
            sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth]))
        )
    sys.modules[_PATH].RoPEAttention = RoPEAttention
    original, module, x = RoPEAttention.forward, RoPEAttention(48, 2), torch.randn(1, 16, 48)
    with patch("vjepa2.1") as names:
        assert names == [f"{_PATH}:RoPEAttention"]
        patched = module(x)[0]
    assert RoPEAttention.forward is original
    accelerate(module)
    assert torch.equal(module(x)[0], patched)
