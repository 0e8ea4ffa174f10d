"""The pieces that kernels are made of: rounding under the interpreter, the search for a tile's
sequence, clamping, 64-bit addresses."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

import triton.language as tl  # noqa: E402

from jepa_kernels.ops.masked_attention.triton_tiles import (  # noqa: E402
    find_sequence,
    owned_tile,
    panel_start,
    token_places,
)
from jepa_kernels.testing import EXACT, FLOAT32  # noqa: E402
from jepa_kernels.triton_support import INTERPRET, matmul, narrow  # noqa: E402


@triton.jit
def _narrow_kernel(x, y, SIZE: tl.constexpr):
    where = tl.arange(0, SIZE)
    tl.store(y + where, narrow(tl.load(x + where), y.dtype.element_ty))


@triton.jit
def _matmul_kernel(a, b, c, SIZE: tl.constexpr):
    where = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(
        c + where,
        matmul(tl.load(a + where), tl.load(b + where), tl.full([SIZE, SIZE], 1.0, tl.float32)),
    )


@triton.jit
def _sequence_kernel(
    cu, seqs, firsts, num_seqs, rows, BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr
):
    seq, first = find_sequence(cu, num_seqs, rows, tl.program_id(0), BLOCK, SEARCH_STEPS)
    tl.store(seqs + tl.program_id(0), seq)
    tl.store(firsts + tl.program_id(0), first)


@triton.jit
def _owned_kernel(cu, found, num_seqs, rows, other_rows, tiles, BLOCK: tl.constexpr):
    _, head, first, start, length, other_start, other_length = owned_tile(
        cu, cu, num_seqs, rows, other_rows, tiles, 1, BLOCK, True, 1
    )
    row = found + tl.program_id(0) * 5
    tl.store(row, start)
    tl.store(row + 1, length.to(tl.int64))
    tl.store(row + 2, other_start)
    tl.store(row + 3, other_length.to(tl.int64))
    tl.store(row + 4, first.to(tl.int64))


@triton.jit
def _places_kernel(ids, found, grid_t, grid_h, grid_w, SIZE: tl.constexpr):
    row_t, row_y, row_x, turns = token_places(ids, 1, SIZE - 1, grid_t, grid_h, grid_w, SIZE)
    where = tl.arange(0, SIZE)
    tl.store(found + where, row_t)
    tl.store(found + SIZE + where, row_y)
    tl.store(found + 2 * SIZE + where, row_x)
    tl.store(found + 3 * SIZE + where, turns.to(tl.int32))


@triton.jit
def _address_kernel(
    base, found, batch, row, head, stride_batch, stride_row, stride_head, ALIGN: tl.constexpr
):
    there = panel_start(base, batch, row, head, stride_batch, stride_row, stride_head, ALIGN)
    tl.store(found, there.to(tl.int64) - base.to(tl.int64))


def test_the_interpreter_is_on():
    assert INTERPRET.value is True


def test_narrow_rounds_to_nearest_even():
    exact = torch.tensor([1.0, -2.5, 0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.3e38])
    bits = torch.tensor(
        [
            0x3F808000,
            0x3F818000,
            0x3F807FFF,
            0x3F808001,
            0x7F800001,
            -0x7F0001,
            0x00008000,
            0x7F7FFFFF,
        ],
        dtype=torch.int32,
    )
    x = torch.cat((exact, bits.view(torch.float32), torch.randn(48)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = torch.zeros(64, dtype=dtype)
        _narrow_kernel[(1,)](x, y, SIZE=64)
        torch.testing.assert_close(y, x.to(dtype), **EXACT, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matmul_accumulates_in_float32(dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.zeros(16, 16)
    _matmul_kernel[(1,)](a, b, c, SIZE=16)
    torch.testing.assert_close(c.double(), a.double() @ b.double() + 1, **FLOAT32)


@pytest.mark.parametrize(("sequences", "steps"), [(0, 1), (1, 1), (5, 1), (128, 2), (300, 2)])
def test_every_row_is_in_one_tile_of_its_sequence(sequences, steps):
    """The tiles found for all programs cover each sequence, and the rows past the last offset,
    once."""
    block, slack = 4, 7
    lengths = torch.randint(0, 11, (sequences,))
    cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    rows = int(cu[-1]) + slack
    programs = rows // block + sequences + 1
    seqs, firsts = (
        torch.zeros(programs, dtype=torch.int32),
        torch.zeros(programs, dtype=torch.int32),
    )
    _sequence_kernel[(programs,)](
        cu, seqs, firsts, sequences, rows, BLOCK=block, SEARCH_STEPS=steps
    )
    ends = torch.cat((cu[1:], torch.tensor([rows])))
    owner = torch.full((rows,), -1)
    for program in range(programs):
        seq = int(seqs[program])
        first = int(cu[seq]) + (program - int(firsts[program])) * block
        covered = slice(first, min(first + block, int(ends[seq])))
        assert covered.stop <= first or bool((owner[covered] == -1).all())
        owner[covered] = seq
    torch.testing.assert_close(
        owner, torch.repeat_interleave(torch.arange(sequences + 1), ends - cu)
    )


@pytest.mark.parametrize(
    "values", [[-5, 9, 4, 2**40], [3, 3, 3, 3], [50, 40, 30, 20], [-(2**62), 2**62, 0, 5]], ids=str
)
def test_wrong_offsets_are_clamped(values):
    rows, other_rows, block = 12, 10, 4
    programs = rows // block + 4
    found = torch.full((programs, 5), -(10**9))
    _owned_kernel[(programs,)](
        torch.tensor(values), found, 3, rows, other_rows, programs, BLOCK=block
    )
    start, length, other_start, other_length, first = found.unbind(1)
    assert bool((start >= 0).all() and (length >= 0).all() and (start + length <= rows).all())
    assert bool(
        (other_start >= 0).all()
        and (other_length >= 0).all()
        and (other_start + other_length <= other_rows).all()
    )
    assert bool((first >= 0).all() | (length <= 0)[first < 0].all())


def test_token_places():
    ids = torch.tensor([0, 59, -1, 37, -8, 60, 2**40, 5])
    found = torch.zeros(4, 8, dtype=torch.int32)
    _places_kernel[(1,)](ids, found, 3, 4, 5, SIZE=8)
    place = ids.clamp(0, 59)[:7]
    assert found[0, :7].tolist() == (place // 20).tolist()
    assert found[1, :7].tolist() == (3 + place // 5 % 4).tolist()
    assert found[2, :7].tolist() == (7 + place % 5).tolist()
    # The last row is past the rows that are there.
    assert found[3].tolist() == [1, 1, 0, 1, 0, 1, 1, 0]


def test_addresses_are_64_bit():
    found = torch.zeros(1, dtype=torch.int64)
    _address_kernel[(1,)](torch.zeros(1), found, 3, 70000, 2, 2**31 - 1, 2**20, 64, ALIGN=8)
    assert int(found) == 4 * 8 * (3 * (2**31 - 1) + 70000 * 2**20 + 2 * 64)
