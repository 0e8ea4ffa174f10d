"""VisiblePatchEmbed: a Conv3d's weights at the visible tubelets."""

from __future__ import annotations

import doctest

import pytest
import torch

from jepa_kernels.nn import VisiblePatchEmbed, patches
from jepa_kernels.testing import FLOAT32_CANCELLING
from jepa_kernels.testing.embedding import MEAN, STD

IDS = torch.tensor([5, 0, 11])


def clip(frames: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((2, 3, frames, 24, 32), generator=generator)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolutions_weights_load_and_give_its_values(bias):
    module = VisiblePatchEmbed(3, 16, (2, 8, 8), bias=bias)
    conv = torch.nn.Conv3d(3, 16, (2, 8, 8), (2, 8, 8), bias=bias)
    names = {f"proj.{name}": tensor for name, tensor in conv.state_dict().items()}
    module.load_state_dict(names)  # strict
    expected = conv(clip()).flatten(2).mT
    torch.testing.assert_close(module(clip()), expected, **FLOAT32_CANCELLING)
    torch.testing.assert_close(module(clip(), IDS), expected[:, IDS], **FLOAT32_CANCELLING)
    packed = module(clip(), torch.cat((IDS, IDS[:2])), torch.tensor([0, 3, 5]))
    torch.testing.assert_close(packed[3:], expected[1, IDS[:2]], **FLOAT32_CANCELLING)


def test_a_wrapped_convolution_shares_its_parameters():
    conv = torch.nn.Conv3d(3, 16, (2, 8, 8), (2, 8, 8))
    module = VisiblePatchEmbed.from_conv(conv, mean=MEAN[:3], std=STD[:3])
    assert [p is q for p, q in zip(module.parameters(), conv.parameters(), strict=True)] == [
        True
    ] * 2
    pixels = (255 * clip()).byte()
    mean, std = (torch.tensor(s[:3]).view(3, 1, 1, 1) for s in (MEAN, STD))
    expected = conv((pixels.float() / 255 - mean) / std).flatten(2).mT
    out = module(pixels, IDS)
    torch.testing.assert_close(out, expected[:, IDS], **FLOAT32_CANCELLING)
    out.sum().backward()
    assert conv.weight.grad.abs().sum() > 0


def test_an_image_counts_as_a_tubelet_of_equal_frames():
    module = VisiblePatchEmbed(3, 16, (2, 8, 8))
    image = clip(1)
    twice = module(image.expand(-1, -1, 2, -1, -1), IDS)
    torch.testing.assert_close(module(image, IDS), twice, **FLOAT32_CANCELLING)


@pytest.mark.parametrize(
    "options",
    [{"stride": (1, 8, 8)}, {"padding": 1}, {"dilation": 2}, {"groups": 3, "stride": (2, 8, 8)}],
    ids=str,
)
def test_other_convolutions_are_refused(options):
    conv = torch.nn.Conv3d(3, 6, (2, 8, 8), **{"stride": (2, 8, 8), **options})
    with pytest.raises(ValueError, match="VisiblePatchEmbed: conv must have stride = kernel, and"):
        VisiblePatchEmbed.from_conv(conv)


def test_the_example_runs():
    assert doctest.testmod(patches).attempted > 0
    assert doctest.testmod(patches).failed == 0
