"""Tile shapes of the Triton kernels: a static table, so that results never depend on a timing. Host code, does not import triton.

Every GPU row is compiled offline by tests/gates/test_triton_gate.py: no spills, tensor-core instructions present.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Queries and keys per tile, warps, depth of the load pipeline, and the most registers a thread may take (None: what it likes)."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None


class Channels(NamedTuple):
    """How a head is held: `main` channels and a `tail`, both powers of two (tail 0: none), of which `head_dim` are real."""

    main: int
    tail: int


def channels(head_dim: int) -> Channels:
    """The cheapest split. Tensor cores need 16 channels; a tail pays where the next power of two would be a quarter or more padding."""
    if 32 < head_dim <= 48:
        return Channels(32, 16)
    if 64 < head_dim <= 80:
        return Channels(64, 16)
    if 80 < head_dim <= 96:
        return Channels(64, 32)
    return Channels(max(16, 1 << (head_dim - 1).bit_length()), 0)


def tile(kernel: str, architecture: int, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile of `kernel` ("fwd", "bwd_q" or "bwd_kv") on a GPU architecture (80, 90, 100, 120; 0 for the interpreter)."""
    if architecture == 0:
        return Tile(32, 32, 4, 1)
    return Tile(64, 64, 4, 2)


# The rotation prologue: rows a program turns, and heads that reuse one gather of the angles. More of either would leave a GPU idle.
ROTATE_TILE = Tile(32, 1, 4, 1)
ROTATE_HEADS = 4
