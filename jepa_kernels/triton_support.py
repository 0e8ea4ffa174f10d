"""Arithmetic that every Triton kernel here shares, right on a GPU and under the interpreter alike.
Importing it imports triton.

The interpreter computes on raw bfloat16 bit patterns and truncates when it narrows, so a kernel
must not multiply or round bfloat16 with the plain operators: load, widen with ``.to(tl.float32)``,
and come back through `narrow`; matrix products go through `matmul`.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Launch options of every kernel. Fusing a*b+c into one rounding is Triton's default to 3.9 and not
# after: say it.
FP_FUSION = {"enable_fp_fusion": True}


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 `x` as `dtype`, rounded to nearest even; NaN stays NaN."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        # The carry could turn a NaN into an infinity: keep its top bits and set a quiet one.
        kept = tl.where(x == x, rounded, (bits >> 16) | 0x40)
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def matmul(a, b, acc):
    """acc + a @ b with float32 accumulation: tensor cores for 16-bit operands, IEEE float32 (never
    TF32) for float32 ones."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)
