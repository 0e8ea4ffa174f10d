"""Triton kernel of adamw_ema. Importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import narrow
from ..ema_update.triton_kernels import FUSION, array, move_target

__all__ = ["FUSION", "adamw_ema_kernel"]


@triton.jit
def adamw_ema_kernel(rows, chunks, scalars, found_inf, weights_ptr, keep, take, seed_ptr, PARAM: tl.constexpr, GRAD: tl.constexpr,
                     STATE: tl.constexpr, TARGET: tl.constexpr, COPY: tl.constexpr, ROUNDING: tl.constexpr, ALIGNED: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """One AdamW step, then target <- momentum * target + (1 - momentum) * param.

    A program owns one chunk of BLOCK elements of one parameter; it reads param, grad, both moments and target and writes all but grad.
    Table columns: param, grad, exp_avg, exp_avg_sq, target, copy, compensation, elements, stream. `scalars` float32 [tensors, 8]:
    decay, grad factor, 1 - beta1, beta2, 1 - beta2, step size, 1 / sqrt(1 - beta2^step), eps.
    """
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program).to(tl.int64)
    row = rows + tensor * 9
    offsets = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(row + 7)
    if found_inf is not None:
        # A step whose gradients overflowed changes nothing, the teacher included.
        count = tl.where(tl.load(found_inf) == 0.0, count, 0)
    mask = offsets < count
    s = scalars + tensor * 8
    decay, factor, take1, beta2 = tl.load(s), tl.load(s + 1), tl.load(s + 2), tl.load(s + 3)
    take2, size, inverse_sqrt2, eps = tl.load(s + 4), tl.load(s + 5), tl.load(s + 6), tl.load(s + 7)

    param_at = array(row, 0, PARAM, ALIGNED) + offsets
    first_at = array(row, 2, STATE, ALIGNED) + offsets
    second_at = array(row, 3, STATE, ALIGNED) + offsets
    param = tl.load(param_at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(array(row, 1, GRAD, ALIGNED) + offsets, mask=mask, other=0.0).to(tl.float32) * factor
    first = tl.load(first_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_at, mask=mask, other=0.0).to(tl.float32)

    first = first + take1 * (grad - first)
    second = beta2 * second + take2 * (grad * grad)
    denominator = tl.sqrt_rn(second) * inverse_sqrt2 + eps
    stored = narrow(param * decay - size * tl.div_rn(first, denominator), PARAM)
    tl.store(first_at, narrow(first, STATE), mask=mask)
    tl.store(second_at, narrow(second, STATE), mask=mask)
    tl.store(param_at, stored, mask=mask)
    if TARGET is not None:
        if weights_ptr is not None:
            keep, take = tl.load(weights_ptr), tl.load(weights_ptr + 1)
        # The teacher follows the parameter as stored.
        move_target(row, offsets, mask, stored.to(tl.float32), keep, take, seed_ptr, 4, 8, TARGET, COPY, ROUNDING, ALIGNED)
