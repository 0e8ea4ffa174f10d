"""What the Triton kernels of latent_rollout share. Importing this imports triton.

A program of a recurrence owns a tile of rows and takes it through every step. Its hidden state
stays in registers; the side of a product that must be cut into pieces goes through a scratch row
that only this program reads, with a barrier in between. Counts are not specialised: they change
from call to call, and would compile again whenever one is 1 or a multiple of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import matmul, narrow


@triton.jit
def cumulative(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def density(x):
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_slope(x):
    return cumulative(x) + x * density(x)


@triton.jit
def tile_pointers(base, rows, columns, width):
    """Pointers of a row-major tile; `rows` is int64."""
    return base + rows[:, None] * width + columns[None, :]


@triton.jit
def staged_product(
    value,
    scratch,
    rows,
    within,
    terms,
    depth: tl.constexpr,
    matrix,
    TRANSPOSED: tl.constexpr,
    columns: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """value [BM, depth] (padded to BT) times a row-major matrix, [BM, BN] float32: value @ matrix.T
    for [columns, depth], value @ matrix for [depth, columns] with TRANSPOSED.

    `terms` is depth again, as a number unknown to the compiler: with a known one it unrolls the
    loop until registers spill.
    """
    t = tl.arange(0, BT)
    keep = within[:, None] & (t < depth)[None, :]
    tl.store(
        tile_pointers(scratch, rows, t, depth), narrow(value, scratch.dtype.element_ty), mask=keep
    )
    tl.debug_barrier()
    n = tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, terms, BK):
        k = first + tl.arange(0, BK)
        left = tl.load(
            tile_pointers(scratch, rows, k, depth),
            mask=within[:, None] & (k < depth)[None, :],
            other=0.0,
        )
        if TRANSPOSED:
            place = matrix + k[:, None] * columns + n[None, :]
        else:
            place = matrix + k[:, None] + n[None, :] * depth
        right = tl.load(place, mask=(k < depth)[:, None] & (n < columns)[None, :], other=0.0)
        acc = matmul(left, right, acc)
    tl.debug_barrier()
    return acc
