"""Triton kernels of latent_rollout. Importing this imports triton.

A program of a recurrence owns a tile of rows and takes it through every step. Its hidden state
stays in registers; the side of a product that must be cut into pieces goes through a scratch row
that only this program reads, with a barrier in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import matmul, narrow

STATES = tl.constexpr(0)
ERRORS = tl.constexpr(1)
GRADIENT = tl.constexpr(2)
SMALLEST = tl.constexpr(2.0**-126)

# Counts are not specialised: they change from call to call, and would compile again whenever one is
# 1 or a multiple of 16.


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
    column_stride: tl.constexpr,
    term_stride: tl.constexpr,
    columns: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """value [BM, depth] (padded to BT) times matrix, whose element (term, column) lies by strides:
    [BM, BN] float32.

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
        right = tl.load(
            matrix + k[:, None] * term_stride + n[None, :] * column_stride,
            mask=(k < depth)[:, None] & (n < columns)[None, :],
            other=0.0,
        )
        acc = matmul(left, right, acc)
    tl.debug_barrier()
    return acc


@triton.jit(do_not_specialize=["rows", "horizon", "terms"])
def mlp_fwd_kernel(
    start,
    coupling,
    drift,
    sums,
    inputs,
    scratch,
    rows,
    horizon,
    terms,
    hidden: tl.constexpr,
    KEEP: tl.constexpr,
    SAVE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """a_{k+1} = a_k + C gelu(a_k) + drift, s_{k+1} = s_k + gelu(a_k) for one tile of rows."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    within = r < rows
    keep = within[:, None] & (n < hidden)[None, :]
    a = tl.load(tile_pointers(start, r, n, hidden), mask=keep, other=0.0)
    shift = tl.load(drift + n, mask=n < hidden, other=0.0)
    total = tl.zeros((BM, BN), tl.float32)
    step = rows.to(tl.int64) * hidden
    for k in range(horizon):
        active = a * cumulative(a)
        total += active
        if SAVE:
            tl.store(tile_pointers(inputs + k * step, r, n, hidden), a, mask=keep)
        if KEEP:
            tl.store(tile_pointers(sums + k * step, r, n, hidden), total, mask=keep)
        if k + 1 < horizon:
            a += (
                staged_product(
                    active,
                    scratch,
                    r,
                    within,
                    terms,
                    hidden,
                    coupling,
                    hidden,
                    1,
                    hidden,
                    BM,
                    BN,
                    BN,
                    BK,
                )
                + shift[None, :]
            )
    if not KEEP:
        tl.store(tile_pointers(sums, r, n, hidden), total, mask=keep)


@triton.jit(do_not_specialize=["rows", "horizon", "terms"])
def mlp_bwd_kernel(
    inputs,
    coupling,
    grad_sums,
    grad_inputs,
    activations,
    scratch,
    rows,
    horizon,
    terms,
    hidden: tl.constexpr,
    KEPT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The transpose of mlp_fwd_kernel, last step first: grad_k = grad_{k+1} + gelu'(a_k) (sum of
    later grad_sums + C^T grad_{k+1})."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    within = r < rows
    keep = within[:, None] & (n < hidden)[None, :]
    step = rows.to(tl.int64) * hidden
    following = tl.zeros((BM, BN), tl.float32)
    if not KEPT:
        following += tl.load(tile_pointers(grad_sums, r, n, hidden), mask=keep, other=0.0)
    grad = tl.zeros((BM, BN), tl.float32)
    for i in range(horizon):
        k = horizon - 1 - i
        if KEPT:
            following += tl.load(
                tile_pointers(grad_sums + k * step, r, n, hidden), mask=keep, other=0.0
            )
        a = tl.load(tile_pointers(inputs + k * step, r, n, hidden), mask=keep, other=0.0)
        into = following
        if i > 0:
            into += staged_product(
                grad, scratch, r, within, terms, hidden, coupling, 1, hidden, hidden, BM, BN, BN, BK
            )
            tl.store(
                tile_pointers(activations + k * step, r, n, hidden), a * cumulative(a), mask=keep
            )
        grad += gelu_slope(a) * into
        tl.store(tile_pointers(grad_inputs + k * step, r, n, hidden), grad, mask=keep)


@triton.jit(do_not_specialize=["rows", "horizon", "terms", "deep_terms"])
def hamiltonian_fwd_kernel(
    start,
    weight,
    bias,
    energy,
    coupling,
    sums,
    inputs,
    scratch,
    deep_scratch,
    rows,
    horizon,
    terms,
    deep_terms,
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
            deep = (
                staged_product(
                    a * cumulative(a),
                    scratch,
                    r,
                    within,
                    terms,
                    hidden,
                    weight,
                    hidden,
                    1,
                    middle,
                    BM,
                    BN,
                    BD,
                    BK,
                )
                + b2[None, :]
            )
            back = staged_product(
                w3[None, :] * gelu_slope(deep),
                deep_scratch,
                r,
                within,
                deep_terms,
                middle,
                weight,
                1,
                hidden,
                hidden,
                BM,
                BD,
                BN,
                BK,
            )
            force = gelu_slope(a) * back
            if which == 0:
                sum_q += force
                a += time_step * staged_product(
                    force,
                    scratch,
                    r,
                    within,
                    terms,
                    hidden,
                    coupling,
                    hidden,
                    1,
                    hidden,
                    BM,
                    BN,
                    BN,
                    BK,
                )
            else:
                sum_p += force
                if k + 1 < horizon:
                    a -= time_step * staged_product(
                        force,
                        scratch,
                        r,
                        within,
                        terms,
                        hidden,
                        coupling,
                        1,
                        hidden,
                        hidden,
                        BM,
                        BN,
                        BN,
                        BK,
                    )
        if KEEP:
            tl.store(tile_pointers(sums + k * step, r, n, hidden), sum_q, mask=keep)
            tl.store(tile_pointers(sums + (kept + k) * step, r, n, hidden), sum_p, mask=keep)
    if not KEEP:
        tl.store(tile_pointers(sums, r, n, hidden), sum_q, mask=keep)
        tl.store(tile_pointers(sums + step, r, n, hidden), sum_p, mask=keep)


@triton.jit(do_not_specialize=["rows", "terms", "deep_terms"])
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
    deep_scratch,
    rows,
    terms,
    deep_terms,
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
        if TRANSPOSED:
            grad += time_step * staged_product(
                moved,
                scratch,
                r,
                within,
                terms,
                hidden,
                coupling,
                hidden,
                1,
                hidden,
                BM,
                BN,
                BN,
                BK,
            )
        else:
            grad += time_step * staged_product(
                moved,
                scratch,
                r,
                within,
                terms,
                hidden,
                coupling,
                1,
                hidden,
                hidden,
                BM,
                BN,
                BN,
                BK,
            )
    active = a * cumulative(a)
    tl.store(tile_pointers(right + step, r, n, hidden), active, mask=keep)
    deep = (
        staged_product(
            active, scratch, r, within, terms, hidden, weight, hidden, 1, middle, BM, BN, BD, BK
        )
        + b2[None, :]
    )
    pulled = w3[None, :] * gelu_slope(deep)
    tl.store(tile_pointers(left, r, d, middle), pulled, mask=deep_keep)
    back = staged_product(
        pulled,
        deep_scratch,
        r,
        within,
        deep_terms,
        middle,
        weight,
        1,
        hidden,
        hidden,
        BM,
        BD,
        BN,
        BK,
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
        grad, scratch, r, within, terms, hidden, weight, hidden, 1, middle, BM, BN, BD, BK
    )
    tl.store(
        tile_pointers(energy_rows, r, d, middle), grad_pulled * gelu_slope(deep), mask=deep_keep
    )
    grad_middle = grad_pulled * w3[None, :] * (2.0 - deep * deep) * density(deep)
    tl.store(tile_pointers(left + deep_step, r, d, middle), grad_middle, mask=deep_keep)
    last = gelu_slope(a) * staged_product(
        grad_middle,
        deep_scratch,
        r,
        within,
        deep_terms,
        middle,
        weight,
        1,
        hidden,
        hidden,
        BM,
        BD,
        BN,
        BK,
    )
    tl.store(carry, tl.load(carry, mask=keep, other=0.0) + last, mask=keep)


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
