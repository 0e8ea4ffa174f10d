"""Counter-based random numbers: a pure function of (seed, step, sample, stream, index), so nothing
has to be stored or replayed.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
csrc/host/philox.h computes the same numbers. Counter words: draw block, sample, low half of step,
stream + (high part of step << 16); the key is the 64-bit seed.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Stream(IntEnum):
    """What a number is for. Two purposes never share numbers; a purpose owns 256 sub-streams (such
    as one per mask set)."""

    BLOCK_SIZE = 1
    BLOCK_ORIGIN = 2
    ORDER = 3
    SOURCE = 4
    CLIP_START = 5
    VIEW = 6
    REPLACEMENT = 7
    SHAPES = 8
    MODALITY = 9
    TEXTURES = 10


def stream_id(stream: Stream, sub_stream: int = 0) -> int:
    """The 16-bit stream word of a purpose and a sub-stream."""
    if not 0 <= sub_stream < 256:
        raise ValueError(f"counter_rng: sub_stream must lie in [0, 256), got {sub_stream}.")
    return int(stream) * 256 + sub_stream


def philox4x32(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: int
) -> tuple[NDArray[np.uint64], ...]:
    """Four arrays of 32-bit words (held in uint64) for four broadcastable arrays of 32-bit counter
    words."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(_ROUNDS):
        product_0, product_1 = _MULTIPLIER_0 * c0, _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product_1 & _LOW,
            (product_0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product_0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniforms(
    seed: int, step: int, sample: ArrayLike, stream: int, count: int, first: int = 0
) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) with 53 random bits each, per sample: shape of `sample` + [count].

    `first` is the index of the first number (even: a Philox block gives two numbers). `stream`
    comes from `stream_id`.
    """
    samples = np.asarray(sample)
    check_keys(seed, step, samples)
    if first % 2 or first < 0:
        raise ValueError(f"counter_rng: first must be even and not negative, got {first}.")
    block = np.arange(first // 2, first // 2 + (count + 1) // 2, dtype=np.uint64)
    words = philox4x32(
        (block, samples[..., None], step & 0xFFFFFFFF, stream + ((step >> 32) << 16)), seed
    )
    w0, w1, w2, w3 = np.broadcast_arrays(*words)
    pairs = np.stack([_unit(w0, w1), _unit(w2, w3)], axis=-1)
    return pairs.reshape(*samples.shape, -1)[..., :count]


def _unit(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.float64]:
    bits = ((high >> np.uint64(5)) << np.uint64(26)) | (low >> np.uint64(6))
    return bits.astype(np.float64) * 2.0**-53


def check_keys(seed: int, step: int, samples: NDArray[Any]) -> None:
    """Refuses keys that the counter words cannot hold, so that two keys never share numbers."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"counter_rng: seed must lie in [0, 2**64), got {seed}.")
    if not 0 <= step < 2**48:
        raise ValueError(f"counter_rng: step must lie in [0, 2**48), got {step}.")
    if samples.size and not (
        samples.dtype.kind in "iu" and samples.min() >= 0 and samples.max() < 2**32
    ):
        raise ValueError(
            f"counter_rng: sample must be integers in [0, 2**32), got {samples.dtype} "
            f"{samples.min()} to {samples.max()}."
        )


def permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """A random order of range(size) that depends on (seed, epoch) only."""
    keys = uniforms(seed, epoch, np.zeros((), dtype=np.int64), stream_id(Stream.ORDER), size)
    return np.argsort(keys, kind="stable")
