"""What must hold for any input: properties of masked_attention, found by Hypothesis (derandomised),
on every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_kernels import Rope3D, masked_attention
from jepa_kernels.testing import FLOAT32, FLOAT32_CANCELLING, FLOAT32_DEEP
from tests.ops.test_masked_attention import RUNNABLE

BACKENDS = ["reference", *(b for d, b in RUNNABLE if d == "cpu")]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)
layouts = st.sampled_from(("interleaved", "tiled"))
grids = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, **FLOAT32)


def rows(n: int, generator: torch.Generator, heads: int = 2, head_dim: int = 24) -> torch.Tensor:
    return torch.randn(1, n, heads, head_dim, generator=generator)


@each_backend
@bounded
@given(seed=seeds, n=sizes, m=sizes, grid=grids, layout=layouts)
def test_permuting_tokens_with_their_ids_permutes_the_output(backend, seed, n, m, grid, layout):
    g = torch.Generator().manual_seed(seed)
    q, k, v = rows(n, g), rows(m, g), rows(m, g)
    ids_q, ids_k = (torch.randint(-1, math.prod(grid), (size,), generator=g) for size in (n, m))
    order_q, order_k = torch.randperm(n, generator=g), torch.randperm(m, generator=g)
    rope = Rope3D(grid, layout)
    out = masked_attention(q, k, v, query_ids=ids_q, key_ids=ids_k, rope=rope, backend=backend)
    permuted = masked_attention(
        q[:, order_q],
        k[:, order_k],
        v[:, order_k],
        query_ids=ids_q[order_q],
        key_ids=ids_k[order_k],
        rope=rope,
        backend=backend,
    )
    close(permuted, out[:, order_q])


def _shifted(
    backend: str, layout: str, seed: int, n: int, shift: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output with tokens in one corner of a grid, and with all of them moved by `shift`."""
    g = torch.Generator().manual_seed(seed)
    grid, corner = (9, 10, 11), (4, 5, 6)
    q, k, v = (rows(n, g) * 2 for _ in range(3))
    places = torch.stack([torch.randint(0, side, (n,), generator=g) for side in corner])
    results = []
    for t, y, x in (places, places + torch.tensor(shift)[:, None]):
        ids = (t * grid[1] + y) * grid[2] + x
        results.append(
            masked_attention(q, k, v, query_ids=ids, rope=Rope3D(grid, layout), backend=backend)
        )
    return results[0], results[1]


@each_backend
@bounded
@given(seed=seeds, n=st.integers(2, 20), shift=st.tuples(*(st.integers(0, 5) for _ in range(3))))
def test_interleaved_depends_on_relative_position_only(backend, seed, n, shift):
    before, after = _shifted(backend, "interleaved", seed, n, shift)
    torch.testing.assert_close(before, after, **FLOAT32_DEEP)


@each_backend
def test_tiled_does_not_depend_on_relative_position_only(backend):
    """Its two channels of a pair turn by different angles: not a rotation. Asserted, so that nobody
    'fixes' it silently."""
    before, after = _shifted(backend, "tiled", 0, 12, (3, 4, 5))
    assert (before - after).abs().max() > 0.05


@each_backend
@bounded
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 17), min_size=1, max_size=5),
    slack=st.integers(0, 3),
    layout=layouts,
)
def test_packed_equals_per_sample(backend, seed, lengths, slack, layout):
    g = torch.Generator().manual_seed(seed)
    rope = Rope3D((3, 4, 5), layout)
    total = sum(lengths) + slack
    q, k, v = (rows(total, g)[0] for _ in range(3))
    ids = torch.randint(-1, 60, (total,), generator=g)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    out = masked_attention(q, k, v, query_ids=ids, rope=rope, cu_seqlens_q=cu, backend=backend)
    for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        alone = masked_attention(
            q[a:b][None], k[a:b][None], v[a:b][None], query_ids=ids[a:b], rope=rope, backend=backend
        )
        close(out[a:b], alone[0])
    assert not out[total - slack :].any()


@each_backend
@bounded
@given(seed=seeds, grid=grids, layout=layouts, share=st.floats(0.1, 0.9))
def test_masked_equals_dense_restricted_to_ids(backend, seed, grid, layout, share):
    """Attention among kept tokens equals attention over the whole grid in which the dropped keys
    are given a weight of zero."""
    g = torch.Generator().manual_seed(seed)
    n = math.prod(grid)
    q, k, v = (rows(n, g) for _ in range(3))
    kept = torch.randperm(n, generator=g)[: max(1, int(share * n))]
    rope = Rope3D(grid, layout)
    out = masked_attention(
        q[:, kept], k[:, kept], v[:, kept], query_ids=kept, rope=rope, backend=backend
    )
    whole, lse = masked_attention(
        q, k, v, query_ids=torch.arange(n), rope=rope, return_lse=True, backend="reference"
    )
    dropped = torch.ones(n, dtype=torch.bool)
    dropped[kept] = False
    ids = torch.arange(n)
    if dropped.any():
        rest, lse_rest = masked_attention(
            q,
            k[:, dropped],
            v[:, dropped],
            query_ids=ids,
            key_ids=ids[dropped],
            rope=rope,
            return_lse=True,
            backend="reference",
        )
        # softmax over all = a mixture of the softmax over the kept and that over the dropped, by
        # their sums.
        weight = (lse_rest - lse).exp().movedim(1, -1)[..., None]
        whole = (whole - weight * rest) / (1 - weight)
        usable = (weight < 0.95)[:, kept]
        torch.testing.assert_close(out * usable, whole[:, kept] * usable, **FLOAT32_CANCELLING)
    else:
        close(out, whole[:, kept])


@each_backend
@bounded
@given(seed=seeds, n=sizes, m=sizes, shift=st.floats(-3, 3))
def test_linear_in_value_and_shift_of_keys_without_rope(backend, seed, n, m, shift):
    """A constant value comes out unchanged; adding one vector to every key changes nothing but
    lse."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = rows(n, g), rows(m, g), rows(m, g)
    ones = masked_attention(q, k, torch.full_like(v, 2.5), backend=backend)
    close(ones, torch.full_like(ones, 2.5))
    moved = masked_attention(q, k + shift, v, backend=backend)
    torch.testing.assert_close(moved, masked_attention(q, k, v, backend=backend), **FLOAT32_DEEP)
