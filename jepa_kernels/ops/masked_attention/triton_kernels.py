"""Triton kernels of masked_attention: the rotation prologue and the forward. The backward is in
triton_kernels_bwd.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import matmul, narrow
from .triton_tiles import (
    FIRST_TIME,
    LAST_TIME,
    angle_part,
    chunked_product,
    first_seen,
    load_panel,
    load_times,
    owned_tile,
    panel_start,
    quarter_turn,
    rotate,
    rows_in_time,
    store_panel,
    token_places,
)

_SIZES = [
    "log2_scale",
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


@triton.jit(
    do_not_specialize=[
        "rows",
        "heads",
        "tiles",
        "grid_t",
        "grid_h",
        "grid_w",
        "x_batch",
        "x_row",
        "x_head",
        "id_batch",
        "id_row",
    ]
)
def rotate_rows_kernel(
    x,
    rotated,
    ids,
    table,
    rows,
    heads,
    tiles,
    x_batch,
    x_row,
    x_head,
    id_batch,
    id_row,
    grid_t,
    grid_h,
    grid_w,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS_EACH: tl.constexpr,
):
    """rotated = R(x, ids), written head by head as [batch, heads, rows, HEAD_DIM].

    A program owns BLOCK rows of HEADS_EACH heads: it gathers the cosines and sines once and turns
    all those heads with them, so that the attention kernels, which read each row many times over,
    find it rotated.
    """
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(0) // tiles
    first_row = tile * BLOCK
    rows_left = rows - first_row
    first_id = ids + batch.to(tl.int64) * id_batch + first_row.to(tl.int64) * id_row
    row_t, row_y, row_x, turns = token_places(
        first_id, id_row, rows_left, grid_t, grid_h, grid_w, BLOCK
    )
    sines = table + (grid_t + grid_h + grid_w) * ROPE_DIM
    cos = angle_part(table, row_t, row_y, row_x, turns, 1.0, 0, MAIN, ROPE_DIM)
    sin = angle_part(sines, row_t, row_y, row_x, turns, 0.0, 0, MAIN, ROPE_DIM)
    if TAIL > 0:
        cos_tail = angle_part(table, row_t, row_y, row_x, turns, 1.0, MAIN, TAIL, ROPE_DIM)
        sin_tail = angle_part(sines, row_t, row_y, row_x, turns, 0.0, MAIN, TAIL, ROPE_DIM)
    for i in tl.static_range(HEADS_EACH):
        head = tl.program_id(1) * HEADS_EACH + i
        rows_left = tl.where(head < heads, rows - first_row, 0)
        source = panel_start(x, batch, first_row, head, x_batch, x_row, x_head, ALIGN)
        target = rotated + ((batch.to(tl.int64) * heads + head) * rows + first_row) * HEAD_DIM
        part = load_panel(source, x_row, rows_left, 0, MAIN, BLOCK, HEAD_DIM, ALIGN, True).to(
            tl.float32
        )
        part = narrow(quarter_turn(part, BLOCK, MAIN) * sin + part * cos, rotated.dtype.element_ty)
        store_panel(target, HEAD_DIM // 8, rows_left, part, 0, MAIN, BLOCK, HEAD_DIM, 8)
        if TAIL > 0:
            part = load_panel(
                source, x_row, rows_left, MAIN, TAIL, BLOCK, HEAD_DIM, ALIGN, True
            ).to(tl.float32)
            part = narrow(
                quarter_turn(part, BLOCK, TAIL) * sin_tail + part * cos_tail,
                rotated.dtype.element_ty,
            )
            store_panel(target, HEAD_DIM // 8, rows_left, part, MAIN, TAIL, BLOCK, HEAD_DIM, 8)


@triton.jit
def _attend(
    q,
    q_tail,
    q_tile,
    q_row,
    queries_left,
    k_tile,
    v_tile,
    k_row,
    v_row,
    keys_left,
    log2_scale,
    best,
    total,
    acc,
    acc_tail,
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
    NEGATIVE: tl.constexpr,
    MASKED: tl.constexpr,
    TIMES: tl.constexpr,
):
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867) over BLOCK_K keys,
    in powers of two. TIMES: over those keys whose time lies from `first` to `last` of a query."""
    if CHUNKED:
        scores = chunked_product(
            q_tile, q_row, queries_left, k_tile, k_row, keys_left, BLOCK_Q, BLOCK_K, HEAD_DIM, ALIGN
        )
    else:
        k = load_panel(k_tile, k_row, keys_left, 0, MAIN, BLOCK_K, HEAD_DIM, ALIGN, MASKED)
        scores = matmul(q, tl.trans(k), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
        if TAIL > 0:
            k_tail = load_panel(
                k_tile, k_row, keys_left, MAIN, TAIL, BLOCK_K, HEAD_DIM, ALIGN, MASKED
            )
            scores = matmul(q_tail, tl.trans(k_tail), scores)
    if MASKED:
        seen = (tl.arange(0, BLOCK_K) < keys_left)[None, :]
        if TIMES:
            time = load_times(key_times, tk_row, keys_left, 0, BLOCK_K)[None, :]
            seen = seen & (time >= first[:, None]) & (time <= last[:, None])
        scores = tl.where(seen, scores, float("inf") if NEGATIVE else float("-inf"))
    # Products are scaled inside the exponential, where the multiplication is free; a negative scale
    # makes the least product the best.
    extreme = tl.min(scores, 1) if NEGATIVE else tl.max(scores, 1)
    best_now = tl.maximum(best, extreme * log2_scale)
    shift = best_now
    if TIMES:
        # A query that has seen nothing yet has no best score to subtract.
        shift = tl.where(best_now == float("-inf"), 0.0, best_now)
    weights = tl.exp2(scores * log2_scale - shift[:, None])
    shrink = tl.exp2(best - shift)
    total = total * shrink + tl.sum(weights, 1)
    weights = narrow(weights, v_tile.dtype.element_ty)
    v = load_panel(v_tile, v_row, keys_left, 0, MAIN, BLOCK_K, HEAD_DIM, ALIGN, MASKED)
    acc = matmul(weights, v, acc * shrink[:, None])
    if TAIL > 0:
        v_tail = load_panel(v_tile, v_row, keys_left, MAIN, TAIL, BLOCK_K, HEAD_DIM, ALIGN, MASKED)
        acc_tail = matmul(weights, v_tail, acc_tail * shrink[:, None])
    return best_now, total, acc, acc_tail


@triton.jit(do_not_specialize=_SIZES)
def masked_attention_fwd_kernel(
    query,
    key,
    value,
    out,
    lse,
    query_ids,
    table,
    cu_q,
    cu_k,
    query_times,
    key_times,
    log2_scale,
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
    NEGATIVE: tl.constexpr,
):
    """out = softmax(scale * R(query) key^T) value and lse = log sum exp of the scores, for BLOCK_Q
    queries of one head.

    `key` is rotated already (rotate_rows_kernel) or has no positions; queries are read once, so
    they are rotated here, in registers (ROPE_DIM = 0: no positions). Reads every key and value row
    of its sequence (TIMES: from the first to the last row that one of its queries sees), writes its
    rows of out and lse. `log2_scale` is scale * log2(e), because exp(s) = 2 ** (s log2 e); it is
    never 0 and NEGATIVE says its sign.
    """
    batch, head, first_row, start_q, length_q, start_k, length_k = owned_tile(
        cu_q, cu_k, num_seqs, rows_q, rows_k, tiles, heads, BLOCK_Q, PACKED, SEARCH_STEPS
    )
    rows_left = length_q - first_row
    row = start_q + first_row
    q_tile = panel_start(query, batch, row, head, q_batch, q_row, q_head, ALIGN)
    o_tile = panel_start(out, batch, row, head, o_batch, o_row, o_head, ALIGN)
    q = load_panel(q_tile, q_row, rows_left, 0, MAIN, BLOCK_Q, HEAD_DIM, ALIGN, True)
    q_tail = q
    if TAIL > 0:
        q_tail = load_panel(q_tile, q_row, rows_left, MAIN, TAIL, BLOCK_Q, HEAD_DIM, ALIGN, True)
    if ROPE_DIM > 0:
        dtype = query.dtype.element_ty
        first_id = query_ids + batch.to(tl.int64) * id_batch + row * id_row
        row_t, row_y, row_x, turns = token_places(
            first_id, id_row, rows_left, grid_t, grid_h, grid_w, BLOCK_Q
        )
        sines = table + (grid_t + grid_h + grid_w) * ROPE_DIM
        q = narrow(
            rotate(
                q.to(tl.float32),
                table,
                sines,
                row_t,
                row_y,
                row_x,
                turns,
                BLOCK_Q,
                0,
                MAIN,
                ROPE_DIM,
            ),
            dtype,
        )
        store_panel(o_tile, o_row, rows_left, q, 0, MAIN, BLOCK_Q, HEAD_DIM, ALIGN)
        if TAIL > 0:
            q_tail = narrow(
                rotate(
                    q_tail.to(tl.float32),
                    table,
                    sines,
                    row_t,
                    row_y,
                    row_x,
                    turns,
                    BLOCK_Q,
                    MAIN,
                    TAIL,
                    ROPE_DIM,
                ),
                dtype,
            )
            store_panel(o_tile, o_row, rows_left, q_tail, MAIN, TAIL, BLOCK_Q, HEAD_DIM, ALIGN)
        # The rotated queries pass through this program's own rows of out, which the end overwrites.
        # What is loaded goes to the tensor cores from shared memory; what was computed would sit in
        # registers all through the loop and halve the occupancy.
        tl.debug_barrier()
        q_tile, q_row = o_tile, o_row
        q = load_panel(q_tile, q_row, rows_left, 0, MAIN, BLOCK_Q, HEAD_DIM, ALIGN, True)
        q_tail = q
        if TAIL > 0:
            q_tail = load_panel(
                q_tile, q_row, rows_left, MAIN, TAIL, BLOCK_Q, HEAD_DIM, ALIGN, True
            )

    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, MAIN], tl.float32)
    acc_tail = tl.zeros([BLOCK_Q, TAIL if TAIL > 0 else 1], tl.float32)
    k_tile = panel_start(key, batch, start_k, head, k_batch, k_row, k_head, ALIGN)
    v_tile = panel_start(value, batch, start_k, head, v_batch, v_row, v_head, ALIGN)
    k_step = tl.full([], BLOCK_K * ALIGN, tl.int64) * k_row
    v_step = tl.full([], BLOCK_K * ALIGN, tl.int64) * v_row
    if TIMES:
        own_times = query_times + batch.to(tl.int64) * tq_batch + row * tq_row
        other_times = key_times + batch.to(tl.int64) * tk_batch + start_k * tk_row
        # Rows past the sequence see nothing.
        last = load_times(own_times, tq_row, rows_left, FIRST_TIME, BLOCK_Q)
        inside = tl.arange(0, BLOCK_Q) < rows_left
        first = tl.where(inside, first_seen(last, window), LAST_TIME)
        begin, end = rows_in_time(other_times, tk_row, length_k, tl.min(first), tl.max(last))
        for tile in range(begin // BLOCK_K, (end + BLOCK_K - 1) // BLOCK_K):
            row_k = tile * BLOCK_K
            best, total, acc, acc_tail = _attend(
                q,
                q_tail,
                q_tile,
                q_row,
                rows_left,
                k_tile + tile * k_step,
                v_tile + tile * v_step,
                k_row,
                v_row,
                length_k - row_k,
                log2_scale,
                best,
                total,
                acc,
                acc_tail,
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
                NEGATIVE,
                True,
                True,
            )
    else:
        first, last = 0, 0
        full = length_k // BLOCK_K
        for _ in range(0, full):
            best, total, acc, acc_tail = _attend(
                q,
                q_tail,
                q_tile,
                q_row,
                rows_left,
                k_tile,
                v_tile,
                k_row,
                v_row,
                BLOCK_K,
                log2_scale,
                best,
                total,
                acc,
                acc_tail,
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
                NEGATIVE,
                False,
                False,
            )
            k_tile += k_step
            v_tile += v_step
        if full * BLOCK_K < length_k:
            best, total, acc, acc_tail = _attend(
                q,
                q_tail,
                q_tile,
                q_row,
                rows_left,
                k_tile,
                v_tile,
                k_row,
                v_row,
                length_k - full * BLOCK_K,
                log2_scale,
                best,
                total,
                acc,
                acc_tail,
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
                NEGATIVE,
                True,
                False,
            )

    # Without keys the total is 0: out is 0 and lse -inf.
    inverse = 1.0 / tl.where(total == 0, 1.0, total)
    store_panel(
        o_tile,
        o_row,
        rows_left,
        narrow(acc * inverse[:, None], out.dtype.element_ty),
        0,
        MAIN,
        BLOCK_Q,
        HEAD_DIM,
        ALIGN,
    )
    if TAIL > 0:
        acc_tail = narrow(acc_tail * inverse[:, None], out.dtype.element_ty)
        store_panel(o_tile, o_row, rows_left, acc_tail, MAIN, TAIL, BLOCK_Q, HEAD_DIM, ALIGN)
    log_sum = tl.where(total == 0, float("-inf"), (best + tl.log2(total)) * 0.6931471805599453)
    rows = tl.arange(0, BLOCK_Q)
    lse_row = lse + (batch.to(tl.int64) * heads + head) * rows_q + row
    tl.store(lse_row + rows, log_sum, mask=rows < rows_left)
