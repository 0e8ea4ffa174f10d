"""Triton kernels of sliced_gaussianity. Importing it imports triton.

A program owns a tile of rows by directions of one block of projections u. With z = exp(i spacing u)
in registers, an angle of the next knot costs one complex product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turned(x, limit):
    """Cosine and sine of x: x = q pi + r with |r| <= pi / 2, then polynomials, minimax in absolute
    error (4.6e-9 and 3.9e-10), and the sign of (-1)^q. `limit`: the angle up to which the parts of
    pi give an exact r; a tile with a larger one is reduced in float64."""
    q = _nearest(x * 0.3183098862)
    r = x - q * 3.140625
    r = r - q * 9.67502593994140625e-4
    r = r - q * 1.509957990978376432e-7
    odd = q - 2.0 * _nearest(q * 0.5)
    # A NaN takes part in no comparison, and stays a NaN.
    if tl.max(tl.ravel(tl.where(tl.abs(x) > limit, 1, 0)), axis=0) > 0:
        wide = x.to(tl.float64)
        far = tl.floor(wide * 0.3183098861837907 + 0.5)
        rest = (wide - far * 3.141592653589793) - far * 1.2246467991473532e-16
        r = rest.to(tl.float32)
        # Beyond 2^53 turns nothing is left of the angle: any number within the quarter turns.
        r = tl.where(tl.abs(r) > 1.5707964, r * 0.0, r)
        odd = (far - 2.0 * tl.floor(far * 0.5)).to(tl.float32)
    y = r * r
    s = -1.98066150025399e-4 + y * 2.6000543348952618e-6
    s = -0.16666657096385215 + y * (8.333017288745106e-3 + y * s)
    s = r + r * y * s
    c = 2.4769304057607332e-5 - y * 2.6193811448181094e-7
    c = 0.04166665577302991 + y * (-1.388856915903826e-3 + y * c)
    c = 1.0 + y * (-0.5 + y * c)
    return tl.where(odd != 0.0, -c, c), tl.where(odd != 0.0, -s, s)


@triton.jit
def _nearest(x):
    """The nearest integer of a small number."""
    return tl.floor(x + 0.5)


@triton.jit
def sums_kernel(
    projections,
    sums,
    rows,
    columns,
    knots,
    spacing,
    limit,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums of cosines and sines over one tile of rows, ``[tiles, 2, knots, columns]``: reads u once
    and writes the sums of its tile."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    there = (row[:, None] < rows) & (column[None, :] < columns)
    u = tl.load(projections + row[:, None] * columns + column[None, :], mask=there, other=0.0)
    cosine, sine = turned(u * spacing, limit)
    cosine = tl.where(there, cosine, 0.0)
    sine = tl.where(there, sine, 0.0)
    power_cosine, power_sine = cosine, sine
    to = sums + tile * 2 * knots * columns + column
    for _ in range(knots):
        tl.store(to, tl.sum(power_cosine, axis=0), mask=column < columns)
        tl.store(to + knots.to(tl.int64) * columns, tl.sum(power_sine, axis=0), column < columns)
        next_cosine = power_cosine * cosine - power_sine * sine
        power_sine = power_cosine * sine + power_sine * cosine
        power_cosine = next_cosine
        to += columns


@triton.jit
def slope_kernel(
    projections,
    coefficients,
    rows,
    columns,
    knots,
    spacing,
    limit,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The real part of sum_k (c[1, k] + i c[0, k]) z^k in the place of u, by Horner's rule: reads
    and writes its tile of u once."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    there = (row[:, None] < rows) & (column[None, :] < columns)
    at = projections + row[:, None] * columns + column[None, :]
    cosine, sine = turned(tl.load(at, mask=there, other=0.0) * spacing, limit)
    real = tl.zeros((BM, BN), tl.float32)
    imaginary = tl.zeros((BM, BN), tl.float32)
    plane = knots.to(tl.int64) * columns
    of = coefficients + (knots - 1).to(tl.int64) * columns + column
    for _ in range(knots):
        a = real + tl.load(of + plane, mask=column < columns, other=0.0)[None, :]
        b = imaginary + tl.load(of, mask=column < columns, other=0.0)[None, :]
        real = a * cosine - b * sine
        imaginary = a * sine + b * cosine
        of -= columns
    tl.store(at, real, mask=there)
