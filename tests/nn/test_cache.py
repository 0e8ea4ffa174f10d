"""KeyValueCache against attention over the whole context."""

from __future__ import annotations

import pytest
import torch

from jepa_kernels import Rope3D, frame_times, masked_attention, native
from jepa_kernels.nn import KeyValueCache
from jepa_kernels.testing import BFLOAT16, FLOAT32

GRID = (6, 3, 4)
FRAME = 12
ROPE = Rope3D(GRID)
IDS, TIMES = torch.arange(72), frame_times(GRID)
each_backend = pytest.mark.parametrize(
    "backend", ["torch", *(["cpu"] if native.available() else [])]
)


def tokens(batch: int = 1, n: int = 72, dtype: torch.dtype = torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, 2, 24, generator=g).to(dtype) for _ in range(3)]


def frame(t: int) -> slice:
    return slice(t * FRAME, (t + 1) * FRAME)


def step(cache, q, k, v, t: int, **options):
    at = frame(t)
    numbers = {"ids": IDS[at], "times": TIMES[at]}
    cache.append(k[:, at], v[:, at], **numbers)
    return cache.attend(q[:, at], **numbers, **options)


@each_backend
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_frame_by_frame_equals_recomputing(backend, window, dtype):
    q, k, v = tokens(2, dtype=dtype)
    whole = masked_attention(
        q, k, v, query_ids=IDS, rope=ROPE, query_times=TIMES, window=window, backend=backend
    )
    cache = KeyValueCache(ROPE)
    outs = [step(cache, q, k, v, t, window=window, backend=backend) for t in range(GRID[0])]
    assert len(cache) == 72 and cache.batch == 2
    budget = FLOAT32 if dtype == torch.float32 else BFLOAT16
    torch.testing.assert_close(torch.cat(outs, 1), whole, **budget)


@each_backend
def test_forks_share_their_past_and_go_their_own_ways(backend):
    """Two levels of forks, and the parent going on meanwhile: each equals a cache of its own."""
    q, k, v = tokens()
    futures = [tokens(6, seed=seed) for seed in (1, 2)]
    cache = KeyValueCache(ROPE)
    for t in range(2):
        step(cache, q, k, v, t, backend=backend)
    two = cache.fork(2)
    kept = cache._segments[0].key.data_ptr()
    assert two._segments[0].key.data_ptr() == kept, "the past must not be copied"
    step(two, *[t[::3] for t in futures[0]], 2, backend=backend)
    six = two.fork(3)
    out = step(six, *futures[1], 3, backend=backend)
    parent = step(cache, q, k, v, 2, backend=backend)
    for i in range(6):
        alone = KeyValueCache(ROPE)
        for t in range(2):
            step(alone, q, k, v, t, backend=backend)
        step(alone, *[t[i // 3 * 3][None] for t in futures[0]], 2, backend=backend)
        expected = step(alone, *[t[i][None] for t in futures[1]], 3, backend=backend)
        torch.testing.assert_close(out[i : i + 1], expected, **FLOAT32)
    whole = masked_attention(
        q[:, frame(2)],
        k[:, :36],
        v[:, :36],
        query_ids=IDS[frame(2)],
        key_ids=IDS[:36],
        rope=ROPE,
        backend=backend,
    )
    torch.testing.assert_close(parent, whole, **FLOAT32)


@each_backend
def test_truncating_goes_back_and_leaves_forks_alone(backend):
    q, k, v = tokens()
    cache = KeyValueCache(ROPE)
    for t in range(3):
        first = step(cache, q, k, v, t, backend=backend)
    child = cache.fork(1)
    before = child.attend(q[:, frame(3)], ids=IDS[frame(3)], times=TIMES[frame(3)])
    cache.truncate(24)
    other = tokens(seed=5)
    assert not torch.equal(step(cache, *other, 2, backend=backend), first)
    again = child.attend(q[:, frame(3)], ids=IDS[frame(3)], times=TIMES[frame(3)])
    assert torch.equal(before, again), "the parent wrote over what its fork reads"
    step(child, q, k, v, 3, backend=backend)
    child.truncate(30)
    assert len(child) == 30
    child.truncate(24)
    torch.testing.assert_close(step(child, q, k, v, 2, backend=backend), first, **FLOAT32)


def test_without_positions_and_times():
    q, k, v = tokens(2, 20)
    cache = KeyValueCache()
    cache.append(k[:, :13], v[:, :13])
    cache.append(k[:, 13:], v[:, 13:])
    torch.testing.assert_close(cache.attend(q), masked_attention(q, k, v), **FLOAT32)
    empty = KeyValueCache()
    assert not empty.attend(q).any()


def test_a_query_that_sees_no_segment_gets_zero():
    q, k, v = tokens()
    cache = KeyValueCache(ROPE)
    step(cache, q, k, v, 0)
    child = cache.fork(1)
    step(child, q, k, v, 1)
    early = child.attend(q[:, :3], ids=IDS[:3], times=torch.tensor([-1, 0, 1]))
    assert not early[:, 0].any() and torch.isfinite(early).all() and early[:, 1:].any()


def test_refusals():
    q, k, v = tokens()
    cache = KeyValueCache(ROPE)
    numbers = {"ids": IDS[:12], "times": TIMES[:12]}
    first = k[:, :12], v[:, :12]

    def refused(text: str, call, kind=ValueError) -> None:
        with pytest.raises(kind) as caught:
            call()
        assert text in str(caught.value) and str(caught.value).startswith("KeyValueCache: ")

    refused("ids must be given", lambda: cache.append(*first))
    step(cache, q, k, v, 0)
    step(cache, q, k, v, 1)
    refused(
        "ids must go on from frame 1, which the cache holds, got frame 0. Keys are kept rotated: "
        "where positions restart, fill a new cache.",
        lambda: cache.append(*first, **numbers),
    )
    refused("times must be given", lambda: cache.append(*first, ids=IDS[24:36]))
    refused("times must have shape (12,)", lambda: cache.append(*first, ids=IDS[:12], times=TIMES))
    refused("ids must have dtype", lambda: cache.append(*first, ids=IDS[:12].float()))
    refused("value must have the shape", lambda: cache.append(k[:, :12], v[:, :11], **numbers))
    refused("of the cache", lambda: cache.append(*(t.double() for t in first), **numbers))
    refused(
        "key or query must need no gradient",
        lambda: cache.append(k[:, :12].clone().requires_grad_(), v[:, :12], **numbers),
    )
    refused("copies must be at least 1", lambda: cache.fork(0))
    refused("length must be from 0 to the 24 tokens", lambda: cache.truncate(25))
    refused("rope must be a Rope3D", lambda: KeyValueCache("rope"), TypeError)
