"""Triton kernels of a Hamiltonian's rollout. Importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import cumulative, density, gelu_slope, staged_product, tile_pointers


@triton.jit(do_not_specialize=["rows", "horizon", "terms", "terms2"])
def hamiltonian_fwd_kernel(
    start,
    weight,
    bias,
    energy,
    coupling,
    sums,
    inputs,
    scratch,
    scratch2,
    rows,
    horizon,
    terms,
    terms2,
    time_step,
    hidden: tl.constexpr,
    middle: tl.constexpr,
    KEEP: tl.constexpr,
    SAVE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """Half-steps a += dt C u(a) and a -= dt C^T u(a) in turn, with the sums of u of either kind,
    for one tile of rows."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n, d = tl.arange(0, BN), tl.arange(0, BD)
    within = r < rows
    keep = within[:, None] & (n < hidden)[None, :]
    a = tl.load(tile_pointers(start, r, n, hidden), mask=keep, other=0.0)
    b2 = tl.load(bias + d, mask=d < middle, other=0.0)
    w3 = tl.load(energy + d, mask=d < middle, other=0.0)
    sum_q, sum_p = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    step = rows.to(tl.int64) * hidden
    kept = horizon if KEEP else 1
    for k in range(horizon):
        for which in tl.static_range(2):
            if SAVE:
                tl.store(tile_pointers(inputs + (2 * k + which) * step, r, n, hidden), a, mask=keep)
            active = a * cumulative(a)
            deep = staged_product(
                active, scratch, r, within, terms, hidden, weight, False, middle, BM, BN, BD, BK
            )
            pulled = w3[None, :] * gelu_slope(deep + b2[None, :])
            back = staged_product(
                pulled, scratch2, r, within, terms2, middle, weight, True, hidden, BM, BD, BN, BK
            )
            force = gelu_slope(a) * back
            if which == 0:
                sum_q += force
                moved = staged_product(
                    force,
                    scratch,
                    r,
                    within,
                    terms,
                    hidden,
                    coupling,
                    False,
                    hidden,
                    BM,
                    BN,
                    BN,
                    BK,
                )
                a += time_step * moved
            else:
                sum_p += force
                if k + 1 < horizon:
                    moved = staged_product(
                        force,
                        scratch,
                        r,
                        within,
                        terms,
                        hidden,
                        coupling,
                        True,
                        hidden,
                        BM,
                        BN,
                        BN,
                        BK,
                    )
                    a -= time_step * moved
        if KEEP:
            tl.store(tile_pointers(sums + k * step, r, n, hidden), sum_q, mask=keep)
            tl.store(tile_pointers(sums + (kept + k) * step, r, n, hidden), sum_p, mask=keep)
    if not KEEP:
        tl.store(tile_pointers(sums, r, n, hidden), sum_q, mask=keep)
        tl.store(tile_pointers(sums + step, r, n, hidden), sum_p, mask=keep)


@triton.jit(do_not_specialize=["rows", "terms", "terms2"])
def hamiltonian_bwd_kernel(
    input,
    weight,
    bias,
    energy,
    coupling,
    following,
    carried,
    force,
    left,
    right,
    energy_rows,
    scratch,
    scratch2,
    rows,
    terms,
    terms2,
    time_step,
    hidden: tl.constexpr,
    middle: tl.constexpr,
    MOVES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """The transpose of one half-step for one tile of rows. left: [pulled; grad_middle], right:
    [grad_returned; gelu(a)]."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n, d = tl.arange(0, BN), tl.arange(0, BD)
    within = r < rows
    keep, deep_keep = (
        within[:, None] & (n < hidden)[None, :],
        within[:, None] & (d < middle)[None, :],
    )
    step, deep_step = rows.to(tl.int64) * hidden, rows.to(tl.int64) * middle
    a = tl.load(tile_pointers(input, r, n, hidden), mask=keep, other=0.0)
    grad = tl.load(tile_pointers(following, r, n, hidden), mask=keep, other=0.0)
    # Read and written where it is used: held in registers throughout, it would make them spill.
    carry = tile_pointers(carried, r, n, hidden)
    b2 = tl.load(bias + d, mask=d < middle, other=0.0)
    w3 = tl.load(energy + d, mask=d < middle, other=0.0)
    if MOVES:
        moved = tl.load(carry, mask=keep, other=0.0)
        # TRANSPOSED is of the forward half-step: this product is the other way round.
        pushed = staged_product(
            moved,
            scratch,
            r,
            within,
            terms,
            hidden,
            coupling,
            not TRANSPOSED,
            hidden,
            BM,
            BN,
            BN,
            BK,
        )
        grad += time_step * pushed
    active = a * cumulative(a)
    tl.store(tile_pointers(right + step, r, n, hidden), active, mask=keep)
    deep = staged_product(
        active, scratch, r, within, terms, hidden, weight, False, middle, BM, BN, BD, BK
    )
    deep += b2[None, :]
    pulled = w3[None, :] * gelu_slope(deep)
    tl.store(tile_pointers(left, r, d, middle), pulled, mask=deep_keep)
    back = staged_product(
        pulled, scratch2, r, within, terms2, middle, weight, True, hidden, BM, BD, BN, BK
    )
    slope = gelu_slope(a)
    tl.store(tile_pointers(force, r, n, hidden), slope * back, mask=keep)
    tl.store(
        carry,
        tl.load(carry, mask=keep, other=0.0) + (2.0 - a * a) * density(a) * back * grad,
        mask=keep,
    )
    grad = slope * grad
    tl.store(tile_pointers(right, r, n, hidden), grad, mask=keep)
    grad_pulled = staged_product(
        grad, scratch, r, within, terms, hidden, weight, False, middle, BM, BN, BD, BK
    )
    tl.store(
        tile_pointers(energy_rows, r, d, middle), grad_pulled * gelu_slope(deep), mask=deep_keep
    )
    grad_middle = grad_pulled * w3[None, :] * (2.0 - deep * deep) * density(deep)
    tl.store(tile_pointers(left + deep_step, r, d, middle), grad_middle, mask=deep_keep)
    last = staged_product(
        grad_middle, scratch2, r, within, terms2, middle, weight, True, hidden, BM, BD, BN, BK
    )
    last *= gelu_slope(a)
    tl.store(carry, tl.load(carry, mask=keep, other=0.0) + last, mask=keep)
