"""Triton kernels of a GRU's rollout. Importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import tile_pointers


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit(do_not_specialize=["rows"])
def gru_fwd_kernel(
    from_action,
    from_state,
    bias_input,
    bias_state,
    norm_weight,
    norm_bias,
    state,
    after,
    gates,
    rows,
    state_stride,
    epsilon,
    width: tl.constexpr,
    SAVE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Gates, mixture and LayerNorm of one step for one tile of rows; both products come in without
    their biases."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    inside = n < width
    keep = (r < rows)[:, None] & inside[None, :]
    wide = 3 * width
    action, hidden = tile_pointers(from_action, r, n, wide), tile_pointers(from_state, r, n, wide)
    b_r = tl.load(bias_input + n, mask=inside, other=0.0) + tl.load(
        bias_state + n, mask=inside, other=0.0
    )
    b_u = tl.load(bias_input + width + n, mask=inside, other=0.0) + tl.load(
        bias_state + width + n, mask=inside, other=0.0
    )
    reset = tl.sigmoid(
        tl.load(action, mask=keep, other=0.0) + tl.load(hidden, mask=keep, other=0.0) + b_r[None, :]
    )
    update = tl.sigmoid(
        tl.load(action + width, mask=keep, other=0.0)
        + tl.load(hidden + width, mask=keep, other=0.0)
        + b_u[None, :]
    )
    m_n = (
        tl.load(hidden + 2 * width, mask=keep, other=0.0)
        + tl.load(bias_state + 2 * width + n, mask=inside, other=0.0)[None, :]
    )
    g_n = (
        tl.load(action + 2 * width, mask=keep, other=0.0)
        + tl.load(bias_input + 2 * width + n, mask=inside, other=0.0)[None, :]
    )
    candidate = tanh(g_n + reset * m_n)
    z = tl.load(tile_pointers(state, r, n, state_stride), mask=keep, other=0.0)
    mixed = tl.where(keep, candidate + update * (z - candidate), 0.0)
    mean = tl.sum(mixed, axis=1) / width
    centred = tl.where(keep, mixed - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + epsilon)
    gain, shift = (
        tl.load(norm_weight + n, mask=inside, other=0.0),
        tl.load(norm_bias + n, mask=inside, other=0.0),
    )
    tl.store(
        tile_pointers(after, r, n, width),
        centred * inverse[:, None] * gain[None, :] + shift[None, :],
        mask=keep,
    )
    if SAVE:
        to = tile_pointers(gates, r, n, 4 * width)
        tl.store(to, reset, mask=keep)
        tl.store(to + width, update, mask=keep)
        tl.store(to + 2 * width, candidate, mask=keep)
        tl.store(to + 3 * width, m_n, mask=keep)


@triton.jit(do_not_specialize=["rows"])
def gru_bwd_kernel(
    gates,
    before,
    grad,
    norm_weight,
    grad_gates,
    carried,
    grad_norm,
    rows,
    before_stride,
    epsilon,
    width: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The transpose of gru_fwd_kernel: grad_gates, the part of the state's gradient past the
    products, and this tile's grad_norm, added to."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    inside = n < width
    keep = (r < rows)[:, None] & inside[None, :]
    gate = tile_pointers(gates, r, n, 4 * width)
    reset, update = tl.load(gate, mask=keep, other=0.0), tl.load(gate + width, mask=keep, other=0.0)
    candidate, m_n = (
        tl.load(gate + 2 * width, mask=keep, other=0.0),
        tl.load(gate + 3 * width, mask=keep, other=0.0),
    )
    z = tl.load(tile_pointers(before, r, n, before_stride), mask=keep, other=0.0)
    mixed = candidate + update * (z - candidate)
    mean = tl.sum(mixed, axis=1) / width
    centred = tl.where(keep, mixed - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + epsilon)
    normal = centred * inverse[:, None]
    into = tl.load(tile_pointers(grad, r, n, width), mask=keep, other=0.0)
    norm = grad_norm + tl.program_id(0).to(tl.int64) * 2 * width + n
    tl.store(
        norm, tl.load(norm, mask=inside, other=0.0) + tl.sum(into * normal, axis=0), mask=inside
    )
    tl.store(
        norm + width,
        tl.load(norm + width, mask=inside, other=0.0) + tl.sum(into, axis=0),
        mask=inside,
    )
    scaled = into * tl.load(norm_weight + n, mask=inside, other=0.0)[None, :]
    plain, along = tl.sum(scaled, axis=1) / width, tl.sum(scaled * normal, axis=1) / width
    mix = inverse[:, None] * (scaled - plain[:, None] - normal * along[:, None])
    of_candidate = mix * (1.0 - update) * (1.0 - candidate * candidate)
    to = tile_pointers(grad_gates, r, n, 4 * width)
    tl.store(to, of_candidate * m_n * reset * (1.0 - reset), mask=keep)
    tl.store(to + width, mix * (z - candidate) * update * (1.0 - update), mask=keep)
    tl.store(to + 2 * width, of_candidate, mask=keep)
    tl.store(to + 3 * width, of_candidate * reset, mask=keep)
    tl.store(tile_pointers(carried, r, n, width), mix * update, mask=keep)
