"""Triton kernels of visible_patch_embed. Importing it imports triton.

P are the normalised pixels of the rows, ``[rows, K]``, which are never written: a program reads a
tile of P from the clip, normalises it in registers and multiplies it. (T, H, W) is (steps, lines,
sites) and a token is DEPTH x HIGH x WIDE pixels of each channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import matmul, narrow


@triton.jit
def _corners(
    tokens,
    steps,
    lines,
    sites,
    clip_stride,
    frame_stride,
    line_stride,
    pixel_stride,
    DEPTH: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where tokens begin in the clip. There are fewer than 2^31 tokens, and a clip spans fewer than
    2^31 elements: only the clip's own place needs 64 bits."""
    rest = tokens.to(tl.int32)
    pixel = rest % sites * WIDE
    rest = rest // sites
    line = rest % lines * HIGH
    rest = rest // lines
    frame = rest % steps * DEPTH
    inside = frame * frame_stride + line * line_stride + pixel * pixel_stride
    return (rest // steps).to(tl.int64) * clip_stride + inside


@triton.jit
def _places(
    k,
    channel_stride,
    frame_stride,
    line_stride,
    pixel_stride,
    DEPTH: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The channel of each of a token's numbers, and its distance from the token's first."""
    frame, line, pixel = k // (WIDE * HIGH) % DEPTH, k // WIDE % HIGH, k % WIDE
    channel = k // (WIDE * HIGH * DEPTH)
    inside = frame * frame_stride + line * line_stride + pixel * pixel_stride
    return channel, channel * channel_stride + inside


@triton.jit
def _tile(clip, corner, there, k, offset, channel, normalisation, CHANNELS, K: tl.constexpr):
    """A tile of P in float32, 0 beyond K."""
    known = k < K
    x = tl.load(
        clip + corner[:, None] + offset[None, :], mask=there[:, None] & known[None, :], other=0.0
    ).to(tl.float32)
    gain = tl.load(normalisation + channel, mask=known, other=0.0)
    shift = tl.load(normalisation + CHANNELS + channel, mask=known, other=0.0)
    return x * gain[None, :] + shift[None, :]


@triton.jit
def embed_kernel(
    clip,
    rows,
    normalisation,
    weight,
    bias,
    out,
    count,
    width,
    steps,
    lines,
    sites,
    clip_stride,
    channel_stride,
    frame_stride,
    line_stride,
    pixel_stride,
    HAS_BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out = P W^T + bias, a tile of rows by channels: reads W ``[width, K]`` and the pixels of its
    rows once."""
    K: tl.constexpr = CHANNELS * DEPTH * HIGH * WIDE
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    there = row < count
    tokens = tl.load(rows + row, mask=there, other=0)
    corner = _corners(
        tokens,
        steps,
        lines,
        sites,
        clip_stride,
        frame_stride,
        line_stride,
        pixel_stride,
        DEPTH,
        HIGH,
        WIDE,
    )
    line_of_weight = weight + column.to(tl.int64) * K
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        channel, offset = _places(
            k, channel_stride, frame_stride, line_stride, pixel_stride, DEPTH, HIGH, WIDE
        )
        w = tl.load(
            line_of_weight[None, :] + k[:, None],
            mask=(k[:, None] < K) & (column[None, :] < width),
            other=0.0,
        )
        pixels = _tile(clip, corner, there, k, offset, channel, normalisation, CHANNELS, K)
        acc = matmul(narrow(pixels, w.dtype), w, acc)
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None] * width + column[None, :]
    stored = there[:, None] & (column[None, :] < width)
    tl.store(at, narrow(acc, out.dtype.element_ty), mask=stored)


@triton.jit
def weight_gradient_kernel(
    clip,
    rows,
    normalisation,
    grad_out,
    partial,
    count,
    piece_rows,
    width,
    steps,
    lines,
    sites,
    clip_stride,
    channel_stride,
    frame_stride,
    line_stride,
    pixel_stride,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """partial = G^T P over a piece of the rows, ``[pieces, width, K]``: a program has BM channels
    by BN numbers of a token, and passes BK rows at a time."""
    K: tl.constexpr = CHANNELS * DEPTH * HIGH * WIDE
    channel_out = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BN + tl.arange(0, BN)
    piece = tl.program_id(2).to(tl.int64)
    channel, offset = _places(
        k, channel_stride, frame_stride, line_stride, pixel_stride, DEPTH, HIGH, WIDE
    )
    first = piece * piece_rows
    last = tl.minimum(first + piece_rows, count)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(first, last, BK):
        row = start + tl.arange(0, BK)
        there = row < last
        tokens = tl.load(rows + row, mask=there, other=0)
        corner = _corners(
            tokens,
            steps,
            lines,
            sites,
            clip_stride,
            frame_stride,
            line_stride,
            pixel_stride,
            DEPTH,
            HIGH,
            WIDE,
        )
        g = tl.load(
            grad_out + row[None, :] * width + channel_out[:, None],
            mask=there[None, :] & (channel_out[:, None] < width),
            other=0.0,
        )
        pixels = _tile(clip, corner, there, k, offset, channel, normalisation, CHANNELS, K)
        acc = matmul(g, narrow(pixels, g.dtype), acc)
    at = partial + (piece * width + channel_out[:, None]) * K + k[None, :]
    tl.store(at, acc, mask=(channel_out[:, None] < width) & (k[None, :] < K))


@triton.jit
def scatter_kernel(
    of_pixels,
    order,
    starts,
    normalisation,
    gradient,
    steps,
    lines,
    sites,
    clip_stride,
    channel_stride,
    frame_stride,
    line_stride,
    pixel_stride,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BN: tl.constexpr,
):
    """The clip's gradient at one token: the sum of its rows in their order, 0 where there is
    none."""
    K: tl.constexpr = CHANNELS * DEPTH * HIGH * WIDE
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BN + tl.arange(0, BN)
    channel, offset = _places(
        k, channel_stride, frame_stride, line_stride, pixel_stride, DEPTH, HIGH, WIDE
    )
    first = tl.load(starts + token)
    last = tl.load(starts + token + 1)
    total = tl.zeros((BN,), tl.float32)
    for i in range(first, last):
        row = tl.load(order + i)
        total += tl.load(of_pixels + row * K + k, mask=k < K, other=0.0)
    total *= tl.load(normalisation + channel, mask=k < K, other=0.0)
    corner = _corners(
        token,
        steps,
        lines,
        sites,
        clip_stride,
        frame_stride,
        line_stride,
        pixel_stride,
        DEPTH,
        HIGH,
        WIDE,
    )
    tl.store(gradient + corner + offset, narrow(total, gradient.dtype.element_ty), mask=k < K)
