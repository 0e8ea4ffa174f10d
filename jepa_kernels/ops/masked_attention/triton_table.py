"""Tile shapes of the Triton kernels: a static table, so that results never depend on a timing. Host
code, does not import triton.

Every GPU row is compiled offline by tests/gates/test_triton_gate.py: no spills, tensor-core
instructions present.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Queries and keys per tile, warps, depth of the load pipeline, and the most registers a thread
    may take (None: what it likes)."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None


class Channels(NamedTuple):
    """How a head is held: `main` channels and a `tail`, both powers of two (tail 0: none), of which
    `head_dim` are real."""

    main: int
    tail: int


def channels(dtype: torch.dtype, head_dim: int) -> Channels:
    """The cheapest split. Tensor cores need 16 channels; a tail pays where the next power of two
    would be a quarter or more padding.

    Beyond 96 the halves save nothing in arithmetic, but the rotation in the backward's last step
    then needs half the registers at a time.
    """
    if 32 < head_dim <= 48:
        return Channels(32, 16)
    if 64 < head_dim <= 80:
        return Channels(64, 16)
    if 80 < head_dim <= 96:
        return Channels(64, 32)
    if head_dim > 96 and dtype != torch.float32:
        return Channels(64, 64)
    return Channels(max(16, 1 << (head_dim - 1).bit_length()), 0)


# Per kernel and architecture: tiles for heads held in at most 64, 96 and 128 channels.
#
# Hopper: what decides is how many programs a multiprocessor holds, since one program's exponentials
# hide behind another's products. 128 registers leave room for two programs of 8 warps, 168 for
# three of 4; the wider heads get one program with large tiles. Ampere and consumer Blackwell hold
# operands of mma.sync in registers and spill early, so their tiles are smaller; the latter has 99
# KiB of shared memory a block. Data-centre Blackwell keeps accumulators in tensor memory.
_HALF: dict[str, dict[int, tuple[Tile, Tile, Tile]]] = {
    "fwd": {
        80: (Tile(64, 64, 4, 3), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        90: (Tile(128, 64, 8, 3, 128), Tile(128, 128, 8, 2), Tile(128, 128, 8, 2)),
        100: (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(128, 128, 8, 2)),
        120: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    },
    "bwd_q": {
        80: (Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3)),
        90: (Tile(64, 64, 4, 3, 168), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        100: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        120: (Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3)),
    },
    "bwd_kv": {
        80: (Tile(32, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 8, 2)),
        90: (Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(32, 64, 4, 3)),
        100: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)),
        120: (Tile(32, 64, 4, 3), Tile(16, 64, 4, 2), Tile(16, 64, 8, 2)),
    },
}

# In place of those above where a call has times: to compare them takes registers, which the widest
# tiles do not have.
_HALF_TIMES: dict[tuple[str, int], tuple[Tile, Tile, Tile]] = {
    ("fwd", 100): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("fwd", 120): (Tile(64, 64, 4, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    ("bwd_kv", 100): (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
}

# float32 uses no tensor cores and is the same everywhere. Named, the limit keeps ptxas from
# spilling a little for the sake of occupancy; in one kernel without times it does the opposite.
_FLOAT: dict[str, tuple[Tile, Tile, Tile]] = {
    "fwd": (Tile(64, 32, 8, 2, 255), Tile(64, 32, 8, 2, 255), Tile(64, 64, 8, 2, 255)),
    "bwd_q": (Tile(32, 32, 4, 2, 255), Tile(64, 32, 8, 2, 255), Tile(64, 32, 8, 2, 255)),
    "bwd_kv": (Tile(16, 64, 8, 2, 255), Tile(16, 64, 8, 2, 255), Tile(16, 32, 8, 1)),
}

# The rotation prologue: rows a program turns, and heads that reuse one gather of the angles. More
# of either would leave a GPU idle.
ROTATE_TILE = Tile(32, 1, 4, 1)
ROTATE_HEADS = 4

# The interpreter's cost is per operation, whatever the tile; a small one lets short test sequences
# fill a tile and leave a rest.
_INTERPRETED = Tile(32, 32, 4, 1)


def tile(
    kernel: str, architecture: int, dtype: torch.dtype, head_dim: int, times: bool = False
) -> Tile:
    """The tile of `kernel` ("fwd", "bwd_q" or "bwd_kv") on a GPU architecture (80, 90, 100, 120; 0
    for the interpreter), for calls with or without times."""
    if architecture == 0:
        return _INTERPRETED
    width = sum(channels(dtype, head_dim))
    column = 0 if width <= 64 else 1 if width <= 96 else 2
    if dtype == torch.float32:
        shape = _FLOAT[kernel][column]
        return shape._replace(registers=255) if times else shape
    if times and (kernel, architecture) in _HALF_TIMES:
        return _HALF_TIMES[kernel, architecture][column]
    return _HALF[kernel][architecture][column]
