"""facebookresearch I-JEPA, which no package holds: a module of its name, parameters and attributes,
its attention written out here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jepa_kernels.integrations import accelerate
from tests.integrations.peers import DTYPES, check, randomised


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(drop), nn.Dropout(0.0)

    def forward(self, x):
        query, key, value = (
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        weights = torch.softmax(query @ key.mT * self.scale, dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2)), weights


Attention.__module__ = "src.models.vision_transformer"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype):
    report = check(
        randomised(Attention(48, 2)), lambda module, x: module(x)[0], torch.randn(2, 9, 48), dtype
    )
    assert report.replaced == {"ijepa": [""]}


def test_probabilities_are_none_and_dropout_is_an_obstacle():
    module = Attention(48, 2)
    accelerate(module)
    assert module(torch.randn(1, 9, 48))[1] is None
    assert accelerate(Attention(48, 2, drop=0.1)).left == {"": ["attn_drop must be 0, got 0.1"]}
