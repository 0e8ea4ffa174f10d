"""Triton kernels of a residual MLP's rollout. Importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import cumulative, gelu_slope, staged_product, tile_pointers


@triton.jit(do_not_specialize=["rows", "horizon", "terms"])
def mlp_fwd_kernel(
    start,
    coupling,
    drift,
    sums,
    inputs,
    scratch,
    rows,
    horizon,
    terms,
    hidden: tl.constexpr,
    KEEP: tl.constexpr,
    SAVE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """a_{k+1} = a_k + C gelu(a_k) + drift, s_{k+1} = s_k + gelu(a_k) for one tile of rows."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    within = r < rows
    keep = within[:, None] & (n < hidden)[None, :]
    a = tl.load(tile_pointers(start, r, n, hidden), mask=keep, other=0.0)
    shift = tl.load(drift + n, mask=n < hidden, other=0.0)
    total = tl.zeros((BM, BN), tl.float32)
    step = rows.to(tl.int64) * hidden
    for k in range(horizon):
        active = a * cumulative(a)
        total += active
        if SAVE:
            tl.store(tile_pointers(inputs + k * step, r, n, hidden), a, mask=keep)
        if KEEP:
            tl.store(tile_pointers(sums + k * step, r, n, hidden), total, mask=keep)
        if k + 1 < horizon:
            moved = staged_product(
                active, scratch, r, within, terms, hidden, coupling, False, hidden, BM, BN, BN, BK
            )
            a += moved + shift[None, :]
    if not KEEP:
        tl.store(tile_pointers(sums, r, n, hidden), total, mask=keep)


@triton.jit(do_not_specialize=["rows", "horizon", "terms"])
def mlp_bwd_kernel(
    inputs,
    coupling,
    grad_sums,
    grad_inputs,
    activations,
    scratch,
    rows,
    horizon,
    terms,
    hidden: tl.constexpr,
    KEPT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The transpose of mlp_fwd_kernel, last step first: grad_k = grad_{k+1} + gelu'(a_k) (sum of
    later grad_sums + C^T grad_{k+1})."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    within = r < rows
    keep = within[:, None] & (n < hidden)[None, :]
    step = rows.to(tl.int64) * hidden
    following = tl.zeros((BM, BN), tl.float32)
    if not KEPT:
        following += tl.load(tile_pointers(grad_sums, r, n, hidden), mask=keep, other=0.0)
    grad = tl.zeros((BM, BN), tl.float32)
    for i in range(horizon):
        k = horizon - 1 - i
        if KEPT:
            following += tl.load(
                tile_pointers(grad_sums + k * step, r, n, hidden), mask=keep, other=0.0
            )
        a = tl.load(tile_pointers(inputs + k * step, r, n, hidden), mask=keep, other=0.0)
        into = following
        if i > 0:
            into += staged_product(
                grad, scratch, r, within, terms, hidden, coupling, True, hidden, BM, BN, BN, BK
            )
            tl.store(
                tile_pointers(activations + k * step, r, n, hidden), a * cumulative(a), mask=keep
            )
        grad += gelu_slope(a) * into
        tl.store(tile_pointers(grad_inputs + k * step, r, n, hidden), grad, mask=keep)
