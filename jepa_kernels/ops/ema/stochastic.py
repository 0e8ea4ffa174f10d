"""The random numbers of stochastic rounding: 16 bits for each element, a pure function of (seed,
stream, element).

Every backend computes the same numbers, so a result does not depend on threads, launches or the
backend.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF


def random_bits(seed: torch.Tensor, stream: int, count: int, device: torch.device) -> torch.Tensor:
    """int64 ``[count]`` in [0, 65536) for elements 0 .. count - 1 of one target; `seed` is a 0-d
    int64 tensor."""
    low, high = _key(int(seed), stream)
    element = torch.arange(count, dtype=torch.int64, device=device)
    salt = (high + (element >> 32) * 0x9E3779B9) & _WORD
    inner = _mix32((element & _WORD) ^ low)
    return _mix32((inner + salt) & _WORD) >> 16


def round_bfloat16(value: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """float32 `value` as bfloat16, rounded away from zero with the probability of the discarded
    fraction."""
    pattern = value.contiguous().view(torch.int32).to(torch.int64) & _WORD
    kept = (pattern + bits.reshape(value.shape)) >> 16
    kept = torch.where(value.isnan(), 0x7FC0, kept)
    return torch.where(kept >= 0x8000, kept - 0x10000, kept).to(torch.int16).view(torch.bfloat16)


def _key(seed: int, stream: int) -> tuple[int, int]:
    z = (seed + 0x9E3779B97F4A7C15 * (stream + 1)) & _LONG
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LONG
    z ^= z >> 31
    return z & _WORD, z >> 32


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words held in int64; products wrap modulo 2^64, of which the low word
    is kept."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
