"""The Triton kernel that turns query and key rows before an attention kernel that knows nothing of
token ids, and their gradients back after it."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import narrow
from .triton_tiles import (
    angle_part,
    load_panel,
    panel_start,
    quarter_turn,
    store_panel,
    token_places,
)


@triton.jit
def _rotated(part, cos, sin, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """R part, or R^T part, which is not its inverse: the tiled layout is no rotation."""
    if TRANSPOSED:
        return part * cos - quarter_turn(part * sin, BLOCK, WIDTH)
    else:
        return part * cos + quarter_turn(part, BLOCK, WIDTH) * sin


@triton.jit
def _turn_rows(
    x,
    rotated,
    ids,
    table,
    batch,
    tile,
    rows,
    heads,
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
    TRANSPOSED: tl.constexpr,
):
    """BLOCK rows of HEADS_EACH heads: the cosines and sines are gathered once for all of them."""
    first_row = tile * BLOCK
    first_id = ids + batch.to(tl.int64) * id_batch + first_row.to(tl.int64) * id_row
    row_t, row_y, row_x, turns = token_places(
        first_id, id_row, rows - first_row, grid_t, grid_h, grid_w, BLOCK
    )
    sines = table + (grid_t + grid_h + grid_w) * ROPE_DIM
    cos = angle_part(table, row_t, row_y, row_x, turns, 1.0, 0, MAIN, ROPE_DIM)
    sin = angle_part(sines, row_t, row_y, row_x, turns, 0.0, 0, MAIN, ROPE_DIM)
    if TAIL > 0:
        cos_tail = angle_part(table, row_t, row_y, row_x, turns, 1.0, MAIN, TAIL, ROPE_DIM)
        sin_tail = angle_part(sines, row_t, row_y, row_x, turns, 0.0, MAIN, TAIL, ROPE_DIM)
    dtype = rotated.dtype.element_ty
    out_row = heads * (HEAD_DIM // 8)
    for i in tl.static_range(HEADS_EACH):
        head = tl.program_id(1) * HEADS_EACH + i
        left = tl.where(head < heads, rows - first_row, 0)
        source = panel_start(x, batch, first_row, head, x_batch, x_row, x_head, ALIGN)
        row = batch.to(tl.int64) * rows + first_row
        target = rotated + (row * heads + head) * HEAD_DIM
        part = load_panel(source, x_row, left, 0, MAIN, BLOCK, HEAD_DIM, ALIGN, True)
        part = _rotated(part.to(tl.float32), cos, sin, BLOCK, MAIN, TRANSPOSED)
        store_panel(target, out_row, left, narrow(part, dtype), 0, MAIN, BLOCK, HEAD_DIM, 8)
        if TAIL > 0:
            tail = load_panel(source, x_row, left, MAIN, TAIL, BLOCK, HEAD_DIM, ALIGN, True)
            tail = _rotated(tail.to(tl.float32), cos_tail, sin_tail, BLOCK, TAIL, TRANSPOSED)
            store_panel(target, out_row, left, narrow(tail, dtype), MAIN, TAIL, BLOCK, HEAD_DIM, 8)


@triton.jit(
    do_not_specialize=[
        "rows_q",
        "rows_k",
        "heads",
        "tiles_q",
        "tiles_k",
        "grid_t",
        "grid_h",
        "grid_w",
        "q_batch",
        "q_row",
        "q_head",
        "k_batch",
        "k_row",
        "k_head",
        "q_id_batch",
        "q_id_row",
        "k_id_batch",
        "k_id_row",
    ]
)
def turn_kernel(
    query,
    key,
    query_rotated,
    key_rotated,
    query_ids,
    key_ids,
    table,
    rows_q,
    rows_k,
    heads,
    tiles_q,
    tiles_k,
    grid_t,
    grid_h,
    grid_w,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    q_id_batch,
    q_id_row,
    k_id_batch,
    k_id_row,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS_EACH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """query_rotated = R(query, query_ids) and key_rotated = R(key, key_ids), contiguous ``[batch,
    rows, heads, HEAD_DIM]``; with TRANSPOSED, R^T.

    Axis 0 of the launch holds the tiles of the queries of a batch entry, then those of its keys, so
    that both take one launch; axis 1 holds groups of HEADS_EACH heads.
    """
    tile = tl.program_id(0) % (tiles_q + tiles_k)
    batch = tl.program_id(0) // (tiles_q + tiles_k)
    if tile < tiles_q:
        _turn_rows(
            query,
            query_rotated,
            query_ids,
            table,
            batch,
            tile,
            rows_q,
            heads,
            q_batch,
            q_row,
            q_head,
            q_id_batch,
            q_id_row,
            grid_t,
            grid_h,
            grid_w,
            HEAD_DIM,
            MAIN,
            TAIL,
            ROPE_DIM,
            ALIGN,
            BLOCK,
            HEADS_EACH,
            TRANSPOSED,
        )
    else:
        _turn_rows(
            key,
            key_rotated,
            key_ids,
            table,
            batch,
            tile - tiles_q,
            rows_k,
            heads,
            k_batch,
            k_row,
            k_head,
            k_id_batch,
            k_id_row,
            grid_t,
            grid_h,
            grid_w,
            HEAD_DIM,
            MAIN,
            TAIL,
            ROPE_DIM,
            ALIGN,
            BLOCK,
            HEADS_EACH,
            TRANSPOSED,
        )
