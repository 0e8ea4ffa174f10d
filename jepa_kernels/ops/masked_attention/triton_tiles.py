"""What the masked_attention kernels share: which rows a program owns, how panels of head vectors
are read, and the rotation.

A panel is a block of token rows of one head. The head's channels are held as a main part of MAIN
channels and, where that wastes less than padding to the next power of two, a tail of TAIL channels:
80 is 64 + 16, 88 and 96 are 64 + 32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import matmul

# Fan-out of the search for a tile's sequence: one load finds the sequence among this many.
SEARCH_FANOUT = tl.constexpr(128)
# Times that one load looks through, and the ends of their range.
TIMES_AT_ONCE = tl.constexpr(1024)
FIRST_TIME = tl.constexpr(-(2**31))
LAST_TIME = tl.constexpr(2**31 - 1)


@triton.jit
def bounded_offset(cu, index, rows):
    """cu[index], kept inside the tensor so that bad offsets never reach foreign memory."""
    return tl.minimum(tl.maximum(tl.load(cu + index).to(tl.int64), 0), rows)


@triton.jit
def find_sequence(cu, num_seqs, rows, tile, BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr):
    """The sequence that owns `tile`, and the number of its first tile.

    Tiles of sequence s are numbered from floor(cu[s] / BLOCK) + s, which leaves room for every
    partly filled tile and needs no prefix sum. Sequence num_seqs stands for the rows past the last
    offset.
    """
    seq = 0
    for step in tl.static_range(SEARCH_STEPS):
        stride: tl.constexpr = SEARCH_FANOUT ** (SEARCH_STEPS - 1 - step)
        candidate = seq + tl.arange(0, SEARCH_FANOUT) * stride
        inside = candidate <= num_seqs
        start = tl.load(cu + candidate, mask=inside, other=0).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), rows)
        started = inside & ((start // BLOCK).to(tl.int32) + candidate <= tile)
        seq += (tl.maximum(tl.sum(started.to(tl.int32)), 1) - 1) * stride
    first_tile = (bounded_offset(cu, seq, rows) // BLOCK).to(tl.int32) + seq
    return seq, first_tile


@triton.jit
def owned_tile(
    cu_own,
    cu_other,
    num_seqs,
    rows_own,
    rows_other,
    tiles,
    heads,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
):
    """Maps the program to (batch entry, head, first row of its tile, start and length of its
    sequence on both sides).

    Tiles of one head run side by side, so that they share its other side in L2. A surplus program
    gets an empty sequence and an empty other side: its loops do not run and its stores are masked
    off.
    """
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    if PACKED:
        seq, first_tile = find_sequence(cu_own, num_seqs, rows_own, tile, BLOCK, SEARCH_STEPS)
        last = tl.minimum(seq + 1, num_seqs)
        start = bounded_offset(cu_own, seq, rows_own)
        end = tl.maximum(bounded_offset(cu_own, last, rows_own), start)
        other_start = bounded_offset(cu_other, seq, rows_other)
        other_end = tl.maximum(bounded_offset(cu_other, last, rows_other), other_start)
        end = tl.where(seq == num_seqs, rows_own.to(tl.int64), end)
        length = (end - start).to(tl.int32)
        other_length = (other_end - other_start).to(tl.int32)
        first_row = (tile - first_tile) * BLOCK
        other_length = tl.where(first_row < length, other_length, 0)
        return tl.full([], 0, tl.int32), rest, first_row, start, length, other_start, other_length
    else:
        zero = tl.full([], 0, tl.int64)
        return rest // heads, rest % heads, tile * BLOCK, zero, rows_own, zero, rows_other


@triton.jit
def panel_start(base, batch, row, head, stride_batch, stride_row, stride_head, ALIGN: tl.constexpr):
    """Address of row `row` of one head. Strides come in units of ALIGN elements, which tells the
    compiler how wide loads may be."""
    offset = (
        batch.to(tl.int64) * stride_batch
        + row.to(tl.int64) * stride_row
        + head.to(tl.int64) * stride_head
    )
    return base + offset * ALIGN


@triton.jit
def panel_offsets(
    stride_row, C0: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    """[BLOCK, WIDTH] offsets of channels C0 ... C0 + WIDTH - 1 from a panel's start."""
    rows = tl.arange(0, BLOCK).to(tl.int64) * stride_row * ALIGN
    return rows[:, None] + (C0 + tl.arange(0, WIDTH))[None, :]


@triton.jit
def panel_mask(
    rows_left, C0: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    mask = (tl.arange(0, BLOCK) < rows_left)[:, None]
    if C0 + WIDTH > HEAD_DIM:
        mask = mask & (C0 + tl.arange(0, WIDTH) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_panel(
    start,
    stride_row,
    rows_left,
    C0: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Channels C0 ... of BLOCK rows, zeros past `rows_left` and past the head. Full tiles of full
    width carry no mask at all."""
    offsets = panel_offsets(stride_row, C0, WIDTH, BLOCK, ALIGN)
    if MASK_ROWS:
        return tl.load(
            start + offsets, mask=panel_mask(rows_left, C0, WIDTH, BLOCK, HEAD_DIM), other=0.0
        )
    elif C0 + WIDTH > HEAD_DIM:
        return tl.load(
            start + offsets, mask=(C0 + tl.arange(0, WIDTH) < HEAD_DIM)[None, :], other=0.0
        )
    else:
        return tl.load(start + offsets)


@triton.jit
def chunked_product(
    a_start,
    a_row,
    a_left,
    b_start,
    b_row,
    b_left,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """[BLOCK_A, BLOCK_B] products of the rows of two panels, 16 channels at a time, for float32.

    Without tensor cores a thread holds its rows of both operands over all channels that it sums,
    which spills for a whole head; panels come back from L1 instead.
    """
    acc = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for c in range(0, HEAD_DIM, 16):
        in_head = (c + tl.arange(0, 16) < HEAD_DIM)[None, :]
        a_mask = (tl.arange(0, BLOCK_A) < a_left)[:, None] & in_head
        b_mask = (tl.arange(0, BLOCK_B) < b_left)[:, None] & in_head
        a = tl.load(
            a_start + c + panel_offsets(a_row, 0, 16, BLOCK_A, ALIGN), mask=a_mask, other=0.0
        )
        b = tl.load(
            b_start + c + panel_offsets(b_row, 0, 16, BLOCK_B, ALIGN), mask=b_mask, other=0.0
        )
        acc = matmul(a, tl.trans(b), acc)
    return acc


@triton.jit
def store_panel(
    start,
    stride_row,
    rows_left,
    values,
    C0: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
):
    offsets = panel_offsets(stride_row, C0, WIDTH, BLOCK, ALIGN)
    tl.store(start + offsets, values, mask=panel_mask(rows_left, C0, WIDTH, BLOCK, HEAD_DIM))


@triton.jit
def token_places(ids, stride_id, rows_left, grid_t, grid_h, grid_w, BLOCK: tl.constexpr):
    """Table rows of t, y and x for BLOCK token ids, and whether each token turns at all (id -1 does
    not). Ids are clamped to the grid."""
    rows = tl.arange(0, BLOCK)
    token = tl.load(ids + rows.to(tl.int64) * stride_id, mask=rows < rows_left, other=-1).to(
        tl.int64
    )
    turns = token >= 0
    last = grid_t.to(tl.int64) * grid_h * grid_w - 1
    token = tl.minimum(tl.maximum(token, 0), last).to(tl.int32)
    row_t = token // (grid_h * grid_w)
    row_y = grid_t + (token // grid_w) % grid_h
    row_x = grid_t + grid_h + token % grid_w
    return row_t, row_y, row_x, turns


@triton.jit
def load_times(times, stride_row, rows_left, absent, BLOCK: tl.constexpr):
    """BLOCK times as int32 (what 32 bits do not hold is clamped), `absent` past `rows_left`."""
    rows = tl.arange(0, BLOCK)
    time = tl.load(times + rows.to(tl.int64) * stride_row, mask=rows < rows_left, other=absent)
    return tl.minimum(tl.maximum(time.to(tl.int64), FIRST_TIME), LAST_TIME).to(tl.int32)


@triton.jit
def first_seen(last, window):
    """The earliest time that a query of time `last` sees; a window of 0 is none."""
    first = tl.maximum(last.to(tl.int64) - window + 1, FIRST_TIME).to(tl.int32)
    return tl.where(window == 0, FIRST_TIME, first)


@triton.jit
def rows_in_time(times, stride_row, length, low, high):
    """The first row whose time lies from low to high, and the one after the last; an empty range
    where there is none. Reads every time, many at once: the other side of a tile is found without a
    table that another kernel would have to write."""
    begin = length + 0
    end = length * 0
    for start in range(0, length, TIMES_AT_ONCE):
        rows = start + tl.arange(0, TIMES_AT_ONCE)
        time = tl.load(times + rows.to(tl.int64) * stride_row, mask=rows < length, other=0).to(
            tl.int64
        )
        meets = (rows < length) & (time >= low) & (time <= high)
        begin = tl.minimum(begin, tl.min(tl.where(meets, rows, length)))
        end = tl.maximum(end, tl.max(tl.where(meets, rows + 1, 0)))
    return begin, end


@triton.jit
def angle_part(
    table,
    row_t,
    row_y,
    row_x,
    turns,
    unrotated,
    C0: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE_DIM: tl.constexpr,
):
    """[BLOCK, WIDTH] cosines (or sines) of channels C0 ..., `unrotated` where nothing turns. A few
    KB of table: these loads hit L1."""
    channel = C0 + tl.arange(0, WIDTH)
    axis = (channel // ROPE_DIM)[None, :]
    row = tl.where(axis == 0, row_t[:, None], tl.where(axis == 1, row_y[:, None], row_x[:, None]))
    where = row * ROPE_DIM + (channel % ROPE_DIM)[None, :]
    return tl.load(table + where, mask=turns[:, None] & (axis < 3), other=unrotated)


@triton.jit
def quarter_turn(x, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(x[2i], x[2i+1]) -> (-x[2i+1], x[2i]): registers only, both channels of a pair live in one
    thread."""
    even, odd = tl.split(tl.reshape(x, (BLOCK, WIDTH // 2, 2)))
    return tl.reshape(tl.join(-odd, even), (BLOCK, WIDTH))


@triton.jit
def rotate(
    x,
    table,
    sines,
    row_t,
    row_y,
    row_x,
    turns,
    BLOCK: tl.constexpr,
    C0: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE_DIM: tl.constexpr,
):
    """R x in float32, for channels C0 ... `sines` is the second half of the table. Cosines are
    loaded last: registers are scarce."""
    rotated = quarter_turn(x, BLOCK, WIDTH) * angle_part(
        sines, row_t, row_y, row_x, turns, 0.0, C0, WIDTH, ROPE_DIM
    )
    return rotated + x * angle_part(table, row_t, row_y, row_x, turns, 1.0, C0, WIDTH, ROPE_DIM)


@triton.jit
def rotate_transposed(
    g,
    table,
    sines,
    row_t,
    row_y,
    row_x,
    turns,
    BLOCK: tl.constexpr,
    C0: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE_DIM: tl.constexpr,
):
    """R^T g, the gradient of `rotate`: not its inverse, because the tiled layout is no rotation."""
    rotated = quarter_turn(
        g * angle_part(sines, row_t, row_y, row_x, turns, 0.0, C0, WIDTH, ROPE_DIM), BLOCK, WIDTH
    )
    return g * angle_part(table, row_t, row_y, row_x, turns, 1.0, C0, WIDTH, ROPE_DIM) - rotated
