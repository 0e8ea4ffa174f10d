"""Triton kernel of adamw_ema. Importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import narrow
from ..ema_update.triton_kernels import FUSION, array, load, move_target, store

__all__ = ["BLOCK", "FUSION", "adamw_ema_kernel"]

# Elements of one program: two 16-byte accesses of a float32 array for each of 128 threads; five
# arrays are in flight.
BLOCK = 1024


@triton.jit
def step_chunk(
    row,
    s,
    offsets,
    count,
    keep,
    take,
    seed_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    TARGET: tl.constexpr,
    COPY: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    mask = offsets < count
    decay, factor, take1, beta2 = tl.load(s), tl.load(s + 1), tl.load(s + 2), tl.load(s + 3)
    take2, size, inverse_sqrt2, eps = tl.load(s + 4), tl.load(s + 5), tl.load(s + 6), tl.load(s + 7)
    param_at = array(row, 0, PARAM, ALIGNED) + offsets
    first_at = array(row, 2, STATE, ALIGNED) + offsets
    second_at = array(row, 3, STATE, ALIGNED) + offsets
    param = load(param_at, mask, MASKED)
    grad = load(array(row, 1, GRAD, ALIGNED) + offsets, mask, MASKED) * factor
    first, second = load(first_at, mask, MASKED), load(second_at, mask, MASKED)

    first = first + take1 * (grad - first)
    second = beta2 * second + take2 * (grad * grad)
    denominator = tl.sqrt_rn(second) * inverse_sqrt2 + eps
    stored = narrow(param * decay - size * tl.div_rn(first, denominator), PARAM)
    if TARGET is not None:
        # The teacher follows the parameter as stored. Before the other stores, which the compiler
        # may not move its loads across.
        move_target(
            row,
            offsets,
            mask,
            stored.to(tl.float32),
            keep,
            take,
            seed_ptr,
            4,
            8,
            TARGET,
            COPY,
            ROUNDING,
            ALIGNED,
            MASKED,
        )
    store(first_at, narrow(first, STATE), mask, MASKED)
    store(second_at, narrow(second, STATE), mask, MASKED)
    store(param_at, stored, mask, MASKED)


@triton.jit
def adamw_ema_kernel(
    rows,
    chunks,
    scalars,
    found_inf,
    weights_ptr,
    keep,
    take,
    seed_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    TARGET: tl.constexpr,
    COPY: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One AdamW step, then target <- momentum * target + (1 - momentum) * param.

    A program owns one chunk of BLOCK elements of one parameter; it reads param, grad, both moments
    and target and writes all but grad. Table columns: param, grad, exp_avg, exp_avg_sq, target,
    copy, compensation, elements, stream. `scalars` float32 [tensors, 8]: decay, grad factor, 1 -
    beta1, beta2, 1 - beta2, step size, 1 / sqrt(1 - beta2^step), eps.
    """
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program).to(tl.int64)
    row, s = rows + tensor * 9, scalars + tensor * 8
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    count = tl.load(row + 7)
    if found_inf is not None:
        # A step whose gradients overflowed changes nothing, the teacher included.
        count = tl.where(tl.load(found_inf) == 0.0, count, 0)
    if weights_ptr is not None:
        keep, take = tl.load(weights_ptr), tl.load(weights_ptr + 1)
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        step_chunk(
            row,
            s,
            offsets,
            count,
            keep,
            take,
            seed_ptr,
            PARAM,
            GRAD,
            STATE,
            TARGET,
            COPY,
            ROUNDING,
            ALIGNED,
            False,
        )
    else:
        step_chunk(
            row,
            s,
            offsets,
            count,
            keep,
            take,
            seed_ptr,
            PARAM,
            GRAD,
            STATE,
            TARGET,
            COPY,
            ROUNDING,
            ALIGNED,
            True,
        )
