"""Random directions that every process draws alike: a pure function of (seed, step).

Numbers come from Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1,
2, 3", SC 2011), normal ones by Box and Muller. Counter words: low and high half of
the number of a block of four, low half of step, stream + (high part of step << 16); the key is the
seed.
"""

from __future__ import annotations

import torch

from ... import checks, native
from ...contract import is_plain
from .inputs import NAME, is_integer

_STREAM = 0x5347  # apart from the streams of jepa.counter_rng, which are below 0x1000
_WORD = 0xFFFFFFFF


def random_directions(
    channels: int,
    slices: int,
    seed: int,
    step: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Independent directions, uniform on the sphere: ``[channels, slices]`` with unit columns.

    Args:
        channels: D, at least 1.
        slices: S, at least 1.
        seed: from 0 to 2^63 - 1. The same seed and step give the same directions in every process,
            on every device and, up to rounding, in every dtype.
        step: from 0 to 2^48 - 1.
        dtype: to which the columns are rounded.
        device: where the result lies.

    Raises:
        TypeError, ValueError: a number of the wrong kind, or out of its range.

    Example:
        >>> from jepa_kernels import random_directions
        >>> directions = random_directions(64, 8, seed=0)
        >>> round(float(directions[:, 0].norm()), 5)
        1.0
    """
    for argument, value, least, end in (
        ("channels", channels, 1, 2**31),
        ("slices", slices, 1, 2**31),
        ("seed", seed, 0, 2**63),
        ("step", step, 0, 2**48),
    ):
        is_integer(NAME, argument, value, least)
        if value >= end:
            raise ValueError(checks.sentence(NAME, argument, f"be below {end}", value))
    count = channels * slices
    words = random_words((count + 3) // 4, seed, step, torch.device(device))
    # 24 bits and half of the last place: within (0, 1), and exact.
    uniform = ((words >> 8) & 0xFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-24)
    first, second = uniform.view(-1, 2).unbind(1)
    radius, angle = first.log().mul_(-2.0).sqrt_(), second * (2.0 * torch.pi)
    normal = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).flatten()[:count]
    columns = normal.view(channels, slices)
    # A sum of squares down the columns runs along rows in memory; vector_norm over that axis takes
    # 15 times as long on a CPU.
    return (columns / columns.square().sum(0).sqrt()).to(dtype)


def random_words(blocks: int, seed: int, step: int, device: torch.device) -> torch.Tensor:
    """int64 ``[4 * blocks]`` (int32 from the C++ generator, the same bits): the Philox words."""
    if device.type == "cpu" and native.available() and is_plain(()):
        words = torch.empty(4 * blocks, dtype=torch.int32, device=device)
        torch.ops.jepa_kernels_native.sliced_gaussianity_words_(words, seed, step)
        return words
    block = torch.arange(blocks, dtype=torch.int64, device=device)
    low, high = (torch.full_like(block, word) for word in (step & _WORD, step >> 32))
    counter = (block & _WORD, block >> 32, low, (high << 16) + _STREAM)
    return torch.stack(_philox(counter, seed), dim=1).flatten()


def _philox(counter: tuple[torch.Tensor, ...], key: int) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 of counter words held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(factor: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a product of 32-bit words: int64 keeps the bits of an unsigned one."""
    product = word * factor
    return (product >> 32) & _WORD, product & _WORD
