"""Triton kernels of the masked_attention gradient: one pass over queries, then one over keys. No
atomics, so bitwise repeatable.

With P = exp(scale * S - lse), S = q k^T, q and k rotated, and delta = sum over channels of grad_out
* out (FlashAttention-2, arXiv 2307.08691, algorithm 2):  grad_v = P^T grad_out,  dS = P * (grad_out
  v^T - delta),  grad_q = scale * R^T dS k,
grad_k = scale * R^T dS^T q. The pass over queries runs first: it leaves delta behind for the pass
over keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import matmul, narrow
from .triton_tiles import (
    FIRST_TIME,
    LAST_TIME,
    chunked_product,
    first_seen,
    load_panel,
    load_times,
    owned_tile,
    panel_start,
    rotate_transposed,
    rows_in_time,
    store_panel,
    token_places,
)

_SIZES = [
    "scale",
    "rows_q",
    "rows_k",
    "num_seqs",
    "heads",
    "tiles",
    "grid_t",
    "grid_h",
    "grid_w",
    "q_batch",
    "q_row",
    "q_head",
    "k_batch",
    "k_row",
    "k_head",
    "v_batch",
    "v_row",
    "v_head",
    "g_batch",
    "g_row",
    "g_head",
    "o_batch",
    "o_row",
    "o_head",
    "id_batch",
    "id_row",
    "tq_batch",
    "tq_row",
    "tk_batch",
    "tk_row",
    "window",
]


@triton.jit
def _grad_q_step(
    q,
    q_tail,
    g,
    g_tail,
    q_tile,
    g_tile,
    q_row,
    g_row,
    queries_left,
    k_tile,
    v_tile,
    k_row,
    v_row,
    keys_left,
    log2_scale,
    lse2,
    delta,
    grad,
    grad_tail,
    key_times,
    tk_row,
    first,
    last,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    CHUNKED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    TIMES: tl.constexpr,
):
    """grad += dS k for BLOCK_K keys, TIMES: of which a query sees those whose time lies from its
    `first` to its `last`."""
    k = load_panel(k_tile, k_row, keys_left, 0, MAIN, BLOCK_K, HEAD_DIM, ALIGN, MASKED)
    k_tail = k
    if TAIL > 0:
        k_tail = load_panel(k_tile, k_row, keys_left, MAIN, TAIL, BLOCK_K, HEAD_DIM, ALIGN, MASKED)
    if CHUNKED:
        scores = chunked_product(
            q_tile, q_row, queries_left, k_tile, k_row, keys_left, BLOCK_Q, BLOCK_K, HEAD_DIM, ALIGN
        )
        grad_weights = chunked_product(
            g_tile, g_row, queries_left, v_tile, v_row, keys_left, BLOCK_Q, BLOCK_K, HEAD_DIM, ALIGN
        )
    else:
        v = load_panel(v_tile, v_row, keys_left, 0, MAIN, BLOCK_K, HEAD_DIM, ALIGN, MASKED)
        scores = matmul(q, tl.trans(k), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
        grad_weights = matmul(g, tl.trans(v), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
        if TAIL > 0:
            v_tail = load_panel(
                v_tile, v_row, keys_left, MAIN, TAIL, BLOCK_K, HEAD_DIM, ALIGN, MASKED
            )
            scores = matmul(q_tail, tl.trans(k_tail), scores)
            grad_weights = matmul(g_tail, tl.trans(v_tail), grad_weights)
    weights = tl.exp2(scores * log2_scale - lse2[:, None])
    if MASKED:
        seen = (tl.arange(0, BLOCK_K) < keys_left)[None, :]
        if TIMES:
            time = load_times(key_times, tk_row, keys_left, 0, BLOCK_K)[None, :]
            seen = seen & (time >= first[:, None]) & (time <= last[:, None])
        weights = tl.where(seen, weights, 0.0)
    grad_scores = narrow(weights * (grad_weights - delta[:, None]), k_tile.dtype.element_ty)
    grad = matmul(grad_scores, k, grad)
    if TAIL > 0:
        grad_tail = matmul(grad_scores, k_tail, grad_tail)
    return grad, grad_tail


@triton.jit(do_not_specialize=_SIZES)
def masked_attention_bwd_q_kernel(
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    log2_lse,
    delta,
    grad_query,
    query_ids,
    table,
    cu_q,
    cu_k,
    query_times,
    key_times,
    scale,
    rows_q,
    rows_k,
    num_seqs,
    heads,
    tiles,
    grid_t,
    grid_h,
    grid_w,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
    o_batch,
    o_row,
    o_head,
    id_batch,
    id_row,
    tq_batch,
    tq_row,
    tk_batch,
    tk_row,
    window,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNKED: tl.constexpr,
    PACKED: tl.constexpr,
    TIMES: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_query for BLOCK_Q queries of one head, and what the second pass needs of each row: delta
    and log2(e) * lse, laid out like lse.

    `query` and `key` are rotated already or have no positions. Reads every key and value row of its
    sequence. `out` and `grad_query` share the strides o_*.
    """
    batch, head, first_row, start_q, length_q, start_k, length_k = owned_tile(
        cu_q, cu_k, num_seqs, rows_q, rows_k, tiles, heads, BLOCK_Q, PACKED, SEARCH_STEPS
    )
    rows_left = length_q - first_row
    row = start_q + first_row
    dtype = query.dtype.element_ty
    rows = tl.arange(0, BLOCK_Q)
    panel = (batch.to(tl.int64) * heads + head) * rows_q + row

    g_tile = panel_start(grad_out, batch, row, head, g_batch, g_row, g_head, ALIGN)
    o_tile = panel_start(out, batch, row, head, o_batch, o_row, o_head, ALIGN)
    g = load_panel(g_tile, g_row, rows_left, 0, MAIN, BLOCK_Q, HEAD_DIM, ALIGN, True)
    o = load_panel(o_tile, o_row, rows_left, 0, MAIN, BLOCK_Q, HEAD_DIM, ALIGN, True)
    delta_row = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    g_tail = g
    if TAIL > 0:
        g_tail = load_panel(g_tile, g_row, rows_left, MAIN, TAIL, BLOCK_Q, HEAD_DIM, ALIGN, True)
        o_tail = load_panel(o_tile, o_row, rows_left, MAIN, TAIL, BLOCK_Q, HEAD_DIM, ALIGN, True)
        delta_row += tl.sum(g_tail.to(tl.float32) * o_tail.to(tl.float32), 1)
    tl.store(delta + panel + rows, delta_row, mask=rows < rows_left)

    q_tile = panel_start(query, batch, row, head, q_batch, q_row, q_head, ALIGN)
    q = load_panel(q_tile, q_row, rows_left, 0, MAIN, BLOCK_Q, HEAD_DIM, ALIGN, True)
    q_tail = q
    if TAIL > 0:
        q_tail = load_panel(q_tile, q_row, rows_left, MAIN, TAIL, BLOCK_Q, HEAD_DIM, ALIGN, True)

    log2_scale = scale * 1.4426950408889634
    lse2 = tl.load(lse + panel + rows, mask=rows < rows_left, other=0.0) * 1.4426950408889634
    tl.store(log2_lse + panel + rows, lse2, mask=rows < rows_left)
    grad = tl.zeros([BLOCK_Q, MAIN], tl.float32)
    grad_tail = tl.zeros([BLOCK_Q, TAIL if TAIL > 0 else 1], tl.float32)
    k_tile = panel_start(key, batch, start_k, head, k_batch, k_row, k_head, ALIGN)
    v_tile = panel_start(value, batch, start_k, head, v_batch, v_row, v_head, ALIGN)
    k_step = tl.full([], BLOCK_K * ALIGN, tl.int64) * k_row
    v_step = tl.full([], BLOCK_K * ALIGN, tl.int64) * v_row
    if TIMES:
        own_times = query_times + batch.to(tl.int64) * tq_batch + row * tq_row
        other_times = key_times + batch.to(tl.int64) * tk_batch + start_k * tk_row
        # Rows past the sequence see nothing.
        last = load_times(own_times, tq_row, rows_left, FIRST_TIME, BLOCK_Q)
        first = tl.where(rows < rows_left, first_seen(last, window), LAST_TIME)
        begin, end = rows_in_time(other_times, tk_row, length_k, tl.min(first), tl.max(last))
        for tile in range(begin // BLOCK_K, (end + BLOCK_K - 1) // BLOCK_K):
            row_k = tile * BLOCK_K
            grad, grad_tail = _grad_q_step(
                q,
                q_tail,
                g,
                g_tail,
                q_tile,
                g_tile,
                q_row,
                g_row,
                rows_left,
                k_tile + tile * k_step,
                v_tile + tile * v_step,
                k_row,
                v_row,
                length_k - row_k,
                log2_scale,
                lse2,
                delta_row,
                grad,
                grad_tail,
                other_times + row_k.to(tl.int64) * tk_row,
                tk_row,
                first,
                last,
                HEAD_DIM,
                MAIN,
                TAIL,
                CHUNKED,
                ALIGN,
                BLOCK_Q,
                BLOCK_K,
                True,
                True,
            )
    else:
        first, last = 0, 0
        full = length_k // BLOCK_K
        for _ in range(0, full):
            grad, grad_tail = _grad_q_step(
                q,
                q_tail,
                g,
                g_tail,
                q_tile,
                g_tile,
                q_row,
                g_row,
                rows_left,
                k_tile,
                v_tile,
                k_row,
                v_row,
                BLOCK_K,
                log2_scale,
                lse2,
                delta_row,
                grad,
                grad_tail,
                key_times,
                tk_row,
                first,
                last,
                HEAD_DIM,
                MAIN,
                TAIL,
                CHUNKED,
                ALIGN,
                BLOCK_Q,
                BLOCK_K,
                False,
                False,
            )
            k_tile += k_step
            v_tile += v_step
        if full * BLOCK_K < length_k:
            grad, grad_tail = _grad_q_step(
                q,
                q_tail,
                g,
                g_tail,
                q_tile,
                g_tile,
                q_row,
                g_row,
                rows_left,
                k_tile,
                v_tile,
                k_row,
                v_row,
                length_k - full * BLOCK_K,
                log2_scale,
                lse2,
                delta_row,
                grad,
                grad_tail,
                key_times,
                tk_row,
                first,
                last,
                HEAD_DIM,
                MAIN,
                TAIL,
                CHUNKED,
                ALIGN,
                BLOCK_Q,
                BLOCK_K,
                True,
                False,
            )

    grad_tile = panel_start(grad_query, batch, row, head, o_batch, o_row, o_head, ALIGN)
    grad *= scale
    grad_tail *= scale
    if ROPE_DIM > 0:
        first_id = query_ids + batch.to(tl.int64) * id_batch + row * id_row
        sines = table + (grid_t + grid_h + grid_w) * ROPE_DIM
        row_t, row_y, row_x, turns = token_places(
            first_id, id_row, rows_left, grid_t, grid_h, grid_w, BLOCK_Q
        )
        grad = rotate_transposed(
            grad, table, sines, row_t, row_y, row_x, turns, BLOCK_Q, 0, MAIN, ROPE_DIM
        )
        if TAIL > 0:
            grad_tail = rotate_transposed(
                grad_tail, table, sines, row_t, row_y, row_x, turns, BLOCK_Q, MAIN, TAIL, ROPE_DIM
            )
    store_panel(grad_tile, o_row, rows_left, narrow(grad, dtype), 0, MAIN, BLOCK_Q, HEAD_DIM, ALIGN)
    if TAIL > 0:
        store_panel(
            grad_tile,
            o_row,
            rows_left,
            narrow(grad_tail, dtype),
            MAIN,
            TAIL,
            BLOCK_Q,
            HEAD_DIM,
            ALIGN,
        )


@triton.jit
def _grad_kv_step(
    k,
    k_tail,
    v,
    v_tail,
    k_tile,
    v_tile,
    k_row,
    v_row,
    keys_left,
    q_tile,
    g_tile,
    lse_row,
    delta_row,
    q_row,
    g_row,
    queries_left,
    log2_scale,
    grad_k,
    grad_k_tail,
    grad_v,
    grad_v_tail,
    query_times,
    tq_row,
    window,
    key_time,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    CHUNKED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    TIMES: tl.constexpr,
):
    """grad_v += P^T grad_out and grad_k += dS^T q for BLOCK_Q queries; scores are held keys by
    queries."""
    rows = tl.arange(0, BLOCK_Q)
    q = load_panel(q_tile, q_row, queries_left, 0, MAIN, BLOCK_Q, HEAD_DIM, ALIGN, MASKED)
    g = load_panel(g_tile, g_row, queries_left, 0, MAIN, BLOCK_Q, HEAD_DIM, ALIGN, MASKED)
    q_tail, g_tail = q, g
    if MASKED:
        # An lse of +inf makes the weights of absent queries 0.
        lse2 = tl.load(lse_row + rows, mask=rows < queries_left, other=float("inf"))
        delta = tl.load(delta_row + rows, mask=rows < queries_left, other=0.0)
    else:
        lse2 = tl.load(lse_row + rows)
        delta = tl.load(delta_row + rows)
    if TAIL > 0:
        q_tail = load_panel(
            q_tile, q_row, queries_left, MAIN, TAIL, BLOCK_Q, HEAD_DIM, ALIGN, MASKED
        )
        g_tail = load_panel(
            g_tile, g_row, queries_left, MAIN, TAIL, BLOCK_Q, HEAD_DIM, ALIGN, MASKED
        )
    if CHUNKED:
        scores = chunked_product(
            k_tile, k_row, keys_left, q_tile, q_row, queries_left, BLOCK_K, BLOCK_Q, HEAD_DIM, ALIGN
        )
        grad_weights = chunked_product(
            v_tile, v_row, keys_left, g_tile, g_row, queries_left, BLOCK_K, BLOCK_Q, HEAD_DIM, ALIGN
        )
    else:
        scores = matmul(k, tl.trans(q), tl.zeros([BLOCK_K, BLOCK_Q], tl.float32))
        grad_weights = matmul(v, tl.trans(g), tl.zeros([BLOCK_K, BLOCK_Q], tl.float32))
        if TAIL > 0:
            scores = matmul(k_tail, tl.trans(q_tail), scores)
            grad_weights = matmul(v_tail, tl.trans(g_tail), grad_weights)
    weights = tl.exp2(scores * log2_scale - lse2[None, :])
    if TIMES:
        last = load_times(query_times, tq_row, queries_left, 0, BLOCK_Q)
        first = first_seen(last, window)
        seen = (key_time[:, None] >= first[None, :]) & (key_time[:, None] <= last[None, :])
        weights = tl.where(seen & (rows < queries_left)[None, :], weights, 0.0)
    narrow_weights = narrow(weights, q_tile.dtype.element_ty)
    grad_v = matmul(narrow_weights, g, grad_v)
    grad_scores = narrow(weights * (grad_weights - delta[None, :]), q_tile.dtype.element_ty)
    grad_k = matmul(grad_scores, q, grad_k)
    if TAIL > 0:
        grad_v_tail = matmul(narrow_weights, g_tail, grad_v_tail)
        grad_k_tail = matmul(grad_scores, q_tail, grad_k_tail)
    return grad_k, grad_k_tail, grad_v, grad_v_tail


@triton.jit(do_not_specialize=_SIZES)
def masked_attention_bwd_kv_kernel(
    grad_out,
    query,
    key,
    value,
    log2_lse,
    delta,
    grad_key,
    grad_value,
    key_ids,
    table,
    cu_q,
    cu_k,
    query_times,
    key_times,
    scale,
    rows_q,
    rows_k,
    num_seqs,
    heads,
    tiles,
    grid_t,
    grid_h,
    grid_w,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
    o_batch,
    o_row,
    o_head,
    id_batch,
    id_row,
    tq_batch,
    tq_row,
    tk_batch,
    tk_row,
    window,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNKED: tl.constexpr,
    PACKED: tl.constexpr,
    TIMES: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_key and grad_value (both with the strides o_*) for BLOCK_K keys of one head.

    `query` and `key` are rotated already or have no positions. Reads every query and grad_out row
    of its sequence, and what the first pass left of them.
    """
    batch, head, first_row, start_k, length_k, start_q, length_q = owned_tile(
        cu_k, cu_q, num_seqs, rows_k, rows_q, tiles, heads, BLOCK_K, PACKED, SEARCH_STEPS
    )
    rows_left = length_k - first_row
    row = start_k + first_row
    dtype = key.dtype.element_ty

    k_tile = panel_start(key, batch, row, head, k_batch, k_row, k_head, ALIGN)
    v_tile = panel_start(value, batch, row, head, v_batch, v_row, v_head, ALIGN)
    k = load_panel(k_tile, k_row, rows_left, 0, MAIN, BLOCK_K, HEAD_DIM, ALIGN, True)
    v = load_panel(v_tile, v_row, rows_left, 0, MAIN, BLOCK_K, HEAD_DIM, ALIGN, True)
    k_tail, v_tail = k, v
    if TAIL > 0:
        k_tail = load_panel(k_tile, k_row, rows_left, MAIN, TAIL, BLOCK_K, HEAD_DIM, ALIGN, True)
        v_tail = load_panel(v_tile, v_row, rows_left, MAIN, TAIL, BLOCK_K, HEAD_DIM, ALIGN, True)

    log2_scale = scale * 1.4426950408889634
    grad_k = tl.zeros([BLOCK_K, MAIN], tl.float32)
    grad_v = tl.zeros([BLOCK_K, MAIN], tl.float32)
    grad_k_tail = tl.zeros([BLOCK_K, TAIL if TAIL > 0 else 1], tl.float32)
    grad_v_tail = tl.zeros([BLOCK_K, TAIL if TAIL > 0 else 1], tl.float32)
    q_tile = panel_start(query, batch, start_q, head, q_batch, q_row, q_head, ALIGN)
    g_tile = panel_start(grad_out, batch, start_q, head, g_batch, g_row, g_head, ALIGN)
    panel = (batch.to(tl.int64) * heads + head) * rows_q + start_q
    lse_row = log2_lse + panel
    delta_row = delta + panel
    q_step = tl.full([], BLOCK_Q * ALIGN, tl.int64) * q_row
    g_step = tl.full([], BLOCK_Q * ALIGN, tl.int64) * g_row
    if TIMES:
        own_times = key_times + batch.to(tl.int64) * tk_batch + row * tk_row
        other_times = query_times + batch.to(tl.int64) * tq_batch + start_q * tq_row
        key_time = load_times(own_times, tk_row, rows_left, 0, BLOCK_K)
        inside = tl.arange(0, BLOCK_K) < rows_left
        earliest = tl.min(tl.where(inside, key_time, LAST_TIME))
        latest = tl.max(tl.where(inside, key_time, FIRST_TIME)).to(tl.int64)
        # The latest query that sees a key; without a window there is none.
        latest = tl.where(window == 0, LAST_TIME, latest + window - 1)
        begin, end = rows_in_time(other_times, tq_row, length_q, earliest, latest)
        for tile in range(begin // BLOCK_Q, (end + BLOCK_Q - 1) // BLOCK_Q):
            row_q = tile * BLOCK_Q
            grad_k, grad_k_tail, grad_v, grad_v_tail = _grad_kv_step(
                k,
                k_tail,
                v,
                v_tail,
                k_tile,
                v_tile,
                k_row,
                v_row,
                rows_left,
                q_tile + tile * q_step,
                g_tile + tile * g_step,
                lse_row + row_q,
                delta_row + row_q,
                q_row,
                g_row,
                length_q - row_q,
                log2_scale,
                grad_k,
                grad_k_tail,
                grad_v,
                grad_v_tail,
                other_times + row_q.to(tl.int64) * tq_row,
                tq_row,
                window,
                key_time,
                HEAD_DIM,
                MAIN,
                TAIL,
                CHUNKED,
                ALIGN,
                BLOCK_Q,
                BLOCK_K,
                True,
                True,
            )
    else:
        key_time = 0
        full = length_q // BLOCK_Q
        for _ in range(0, full):
            grad_k, grad_k_tail, grad_v, grad_v_tail = _grad_kv_step(
                k,
                k_tail,
                v,
                v_tail,
                k_tile,
                v_tile,
                k_row,
                v_row,
                rows_left,
                q_tile,
                g_tile,
                lse_row,
                delta_row,
                q_row,
                g_row,
                BLOCK_Q,
                log2_scale,
                grad_k,
                grad_k_tail,
                grad_v,
                grad_v_tail,
                query_times,
                tq_row,
                window,
                key_time,
                HEAD_DIM,
                MAIN,
                TAIL,
                CHUNKED,
                ALIGN,
                BLOCK_Q,
                BLOCK_K,
                False,
                False,
            )
            q_tile += q_step
            g_tile += g_step
            lse_row += BLOCK_Q
            delta_row += BLOCK_Q
        if full * BLOCK_Q < length_q:
            grad_k, grad_k_tail, grad_v, grad_v_tail = _grad_kv_step(
                k,
                k_tail,
                v,
                v_tail,
                k_tile,
                v_tile,
                k_row,
                v_row,
                rows_left,
                q_tile,
                g_tile,
                lse_row,
                delta_row,
                q_row,
                g_row,
                length_q - full * BLOCK_Q,
                log2_scale,
                grad_k,
                grad_k_tail,
                grad_v,
                grad_v_tail,
                query_times,
                tq_row,
                window,
                key_time,
                HEAD_DIM,
                MAIN,
                TAIL,
                CHUNKED,
                ALIGN,
                BLOCK_Q,
                BLOCK_K,
                True,
                False,
            )

    grad_v_tile = panel_start(grad_value, batch, row, head, o_batch, o_row, o_head, ALIGN)
    store_panel(
        grad_v_tile, o_row, rows_left, narrow(grad_v, dtype), 0, MAIN, BLOCK_K, HEAD_DIM, ALIGN
    )
    if TAIL > 0:
        store_panel(
            grad_v_tile,
            o_row,
            rows_left,
            narrow(grad_v_tail, dtype),
            MAIN,
            TAIL,
            BLOCK_K,
            HEAD_DIM,
            ALIGN,
        )
    grad_k_tile = panel_start(grad_key, batch, row, head, o_batch, o_row, o_head, ALIGN)
    grad_k *= scale
    grad_k_tail *= scale
    if ROPE_DIM > 0:
        first_id = key_ids + batch.to(tl.int64) * id_batch + row * id_row
        row_t, row_y, row_x, turns = token_places(
            first_id, id_row, rows_left, grid_t, grid_h, grid_w, BLOCK_K
        )
        sines = table + (grid_t + grid_h + grid_w) * ROPE_DIM
        grad_k = rotate_transposed(
            grad_k, table, sines, row_t, row_y, row_x, turns, BLOCK_K, 0, MAIN, ROPE_DIM
        )
        if TAIL > 0:
            grad_k_tail = rotate_transposed(
                grad_k_tail, table, sines, row_t, row_y, row_x, turns, BLOCK_K, MAIN, TAIL, ROPE_DIM
            )
    store_panel(
        grad_k_tile, o_row, rows_left, narrow(grad_k, dtype), 0, MAIN, BLOCK_K, HEAD_DIM, ALIGN
    )
    if TAIL > 0:
        store_panel(
            grad_k_tile,
            o_row,
            rows_left,
            narrow(grad_k_tail, dtype),
            MAIN,
            TAIL,
            BLOCK_K,
            HEAD_DIM,
            ALIGN,
        )
