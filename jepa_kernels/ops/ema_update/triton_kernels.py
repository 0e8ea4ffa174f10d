"""Triton kernels of ema_update, and the arithmetic that adamw_ema shares with them. Importing this
imports triton.

Products and sums are rounded one by one (FUSION below), so that results equal the other backends'
bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import narrow

NEAREST = tl.constexpr(0)
KAHAN = tl.constexpr(1)
STOCHASTIC = tl.constexpr(2)

FUSION = {"enable_fp_fusion": False}

# Elements of one program: four 16-byte accesses of a float32 array for each of 128 threads.
BLOCK = 2048


@triton.jit
def array(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a column of a table row."""
    address = tl.load(row + column)
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def average(target, source, keep, take):
    """keep * target + take * source, keep + take = 1, exact where either weight is 0 and where both
    values are equal."""
    difference = source - target
    return tl.where(take < 0.5, target + take * difference, source - keep * difference)


@triton.jit
def mix32(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def random_bits(seed, stream, element):
    """16 random bits for each element: ops/ema_update/stochastic.py."""
    z = seed.to(tl.uint64, bitcast=True) + (stream + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z ^= z >> 31
    low, high = z.to(tl.uint32), (z >> 32).to(tl.uint32)
    salt = high + (element >> 32).to(tl.uint32) * 0x9E3779B9
    return mix32(mix32(element.to(tl.uint32) ^ low) + salt) >> 16


@triton.jit
def narrow_randomly(x, bits):
    """float32 `x` as bfloat16, rounded away from zero with the probability of the discarded
    fraction."""
    kept = (x.to(tl.uint32, bitcast=True) + bits) >> 16
    kept = tl.where(x == x, kept, 0x7FC0)
    return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def load(pointer, mask, MASKED: tl.constexpr):
    """A chunk as float32. A mask keeps the compiler from 16-byte accesses, so that only the last
    chunk of a tensor has one."""
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(pointer).to(tl.float32)


@triton.jit
def store(pointer, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer, value, mask=mask)
    else:
        tl.store(pointer, value)


@triton.jit
def move_target(
    row,
    offsets,
    mask,
    source,
    keep,
    take,
    seed_ptr,
    FIRST: tl.constexpr,
    STREAM: tl.constexpr,
    TARGET: tl.constexpr,
    COPY: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Averages `source` into one chunk of the target in column FIRST; the copy and the compensation
    follow it in the table."""
    target = array(row, FIRST, TARGET, ALIGNED) + offsets
    value = load(target, mask, MASKED)
    if ROUNDING == KAHAN and tl.float32 != TARGET:
        compensation = array(row, FIRST + 2, TARGET, ALIGNED) + offsets
        value = value + load(compensation, mask, MASKED)
    value = average(value, source, keep, take)
    if ROUNDING == STOCHASTIC and tl.bfloat16 == TARGET:
        stored = narrow_randomly(
            value, random_bits(tl.load(seed_ptr), tl.load(row + STREAM), offsets)
        )
    else:
        stored = narrow(value, TARGET)
    store(target, stored, mask, MASKED)
    if ROUNDING == KAHAN and tl.float32 != TARGET:
        store(compensation, narrow(value - stored.to(tl.float32), TARGET), mask, MASKED)
    if COPY is not None:
        store(
            array(row, FIRST + 1, COPY, ALIGNED) + offsets,
            narrow(stored.to(tl.float32), COPY),
            mask,
            MASKED,
        )


@triton.jit
def move_chunk(
    row,
    offsets,
    count,
    keep,
    take,
    seed_ptr,
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    COPY: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    mask = offsets < count
    source = load(array(row, 3, SOURCE, ALIGNED) + offsets, mask, MASKED)
    move_target(
        row,
        offsets,
        mask,
        source,
        keep,
        take,
        seed_ptr,
        0,
        5,
        TARGET,
        COPY,
        ROUNDING,
        ALIGNED,
        MASKED,
    )


@triton.jit
def ema_update_kernel(
    rows,
    chunks,
    weights_ptr,
    keep,
    take,
    seed_ptr,
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    COPY: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """target <- momentum * target + (1 - momentum) * source.

    A program owns one chunk of BLOCK elements of one target; it reads target, source (and
    compensation) and writes target (and copy). Table columns: target, copy, compensation, source,
    elements, stream.
    """
    program = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(chunks + 2 * program).to(tl.int64) * 6
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    count = tl.load(row + 4)
    if weights_ptr is not None:
        keep, take = tl.load(weights_ptr), tl.load(weights_ptr + 1)
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        move_chunk(
            row,
            offsets,
            count,
            keep,
            take,
            seed_ptr,
            TARGET,
            SOURCE,
            COPY,
            ROUNDING,
            ALIGNED,
            False,
        )
    else:
        move_chunk(
            row, offsets, count, keep, take, seed_ptr, TARGET, SOURCE, COPY, ROUNDING, ALIGNED, True
        )
