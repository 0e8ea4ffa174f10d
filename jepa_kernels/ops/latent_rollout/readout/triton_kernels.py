"""The Triton kernel of a readout. Importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ....triton_support import matmul, narrow
from ..triton_tiles import tile_pointers

STATES = tl.constexpr(0)
ERRORS = tl.constexpr(1)
GRADIENT = tl.constexpr(2)
SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def log2_size(x):
    """log2 |x|, finite for 0; NaN stays NaN."""
    size = tl.abs(x)
    return tl.log2(tl.where(size < SMALLEST, SMALLEST, size))


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """|x|^EXPONENT / EXPONENT."""
    if EXPONENT == 1.0:
        return tl.abs(x)
    elif EXPONENT == 2.0:
        return 0.5 * x * x
    else:
        return tl.exp2(EXPONENT * log2_size(x)) / EXPONENT


@triton.jit
def power_slope(x, EXPONENT: tl.constexpr):
    if EXPONENT == 2.0:
        return x
    else:
        sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
        if EXPONENT == 1.0:
            return sign
        else:
            return sign * tl.exp2((EXPONENT - 1.0) * log2_size(x))


@triton.jit(do_not_specialize=["rows", "first_step"])
def readout_kernel(
    sums,
    weight,
    bias,
    base,
    base_rows,
    targets,
    target_rows,
    out,
    errors,
    grad_errors,
    grad,
    grad_base,
    rows,
    first_step,
    weight_term,
    weight_column,
    base_stride,
    target_step,
    target_stride,
    out_step,
    out_stride,
    grad_base_stride,
    hidden: tl.constexpr,
    channels: tl.constexpr,
    MODE: tl.constexpr,
    EXPONENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y_k = base + sums_k @ weight + (first_step + k) bias for one tile of rows of one step:
    written, compared, or differentiated."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.program_id(1).to(tl.int64)
    within = r < rows
    at = k * rows + r
    base_row = r
    if base_rows is not None:
        base_row = tl.load(base_rows + r, mask=within, other=0)
    target_offset = k * target_step + r * target_stride
    if target_rows is not None:
        target_offset = tl.load(target_rows + at, mask=within, other=0) * target_stride
    total = tl.zeros((BM,), tl.float32)
    for first in range(0, channels, BN):
        n = first + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for term in range(0, hidden, BK):
            t = term + tl.arange(0, BK)
            left = tl.load(
                tile_pointers(sums, at, t, hidden),
                mask=within[:, None] & (t < hidden)[None, :],
                other=0.0,
            )
            place = weight + t[:, None] * weight_term + n[None, :] * weight_column
            right = tl.load(place, mask=(t < hidden)[:, None] & (n < channels)[None, :], other=0.0)
            acc = matmul(narrow(left, weight.dtype.element_ty), right, acc)
        keep = within[:, None] & (n < channels)[None, :]
        acc += tl.load(
            base + base_row[:, None] * base_stride + n[None, :], mask=keep, other=0.0
        ).to(tl.float32)
        if bias is not None:
            acc += (first_step + k).to(tl.float32) * tl.load(
                bias + n, mask=n < channels, other=0.0
            )[None, :]
        if MODE == STATES:
            tl.store(
                out + k * out_step + r[:, None] * out_stride + n[None, :],
                narrow(acc, out.dtype.element_ty),
                mask=keep,
            )
        else:
            wanted = tl.load(
                targets + target_offset[:, None] + n[None, :], mask=keep, other=0.0
            ).to(tl.float32)
            residual = tl.where(keep, acc - wanted, 0.0)
            if MODE == ERRORS:
                total += tl.sum(power(residual, EXPONENT), axis=1)
            else:
                scale = tl.load(grad_errors + at, mask=within, other=0.0) / channels
                slope = tl.where(keep, power_slope(residual, EXPONENT), 0.0) * scale[:, None]
                tl.store(tile_pointers(grad, at, n, channels), slope, mask=keep)
                into = grad_base + r[:, None] * grad_base_stride + n[None, :]
                tl.store(into, tl.load(into, mask=keep, other=0.0) + slope, mask=keep)
    if MODE == ERRORS:
        tl.store(errors + at, total / channels, mask=within)
