"""The Triton backends (NVIDIA GPUs from compute capability 8.0, and CPU tensors under
TRITON_INTERPRET=1): sizes of the kernels and what a launch needs. Host code, does not import
triton.

16-bit products run on tensor cores; no atomics, so results repeat. Nothing reads a tensor's values,
so a call never waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import triton_runtime
from ...backend import Backend, Reason
from .kernel_backend import KernelsT, Passes, RolloutT, kernel_backend
from .rollout import Rollout

# Rows of a program, and terms of a product staged at a time: all that a thread of eight warps can
# hold at a hidden width of 256.
ROWS, COLUMNS = 16, 64


def triton_backend(rollout: Passes[RolloutT, KernelsT], kernels: KernelsT, widest: int) -> Backend:
    """`widest`: the hidden width that the registers of a program hold."""

    def unsupported(inputs: Rollout) -> list[Reason]:
        here = triton_runtime.unavailable_reasons(inputs.device_type)
        return here + inputs.kernel_reasons(widest)

    devices = triton_runtime.DEVICES
    return kernel_backend(
        "triton", devices, unsupported, rollout, kernels, on=triton_runtime.device_of
    )


def padded(width: int) -> int:
    """The width of a tile: a power of two that tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())


def terms(operand: torch.dtype, middle: int = 0) -> int:
    """Terms of a product that are staged at a time: fewer where elements are wide, or a
    Hamiltonian's tiles leave few registers."""
    return 16 if operand == torch.float32 or middle > 128 else 32


def rows_of(hidden: int, middle: int, operand: torch.dtype) -> int:
    """Rows of a recurrence's program: fewer where the 32-bit tiles of a Hamiltonian would not fit
    the registers of eight warps."""
    return 8 if middle and operand == torch.float32 and max(hidden, middle) > 128 else ROWS


def tiles(hidden: int, operand: torch.dtype, middle: int = 0) -> dict[str, Any]:
    """Tile sizes and options of a recurrence."""
    sizes = {"BM": rows_of(hidden, middle, operand), "BN": padded(hidden)}
    return {**sizes, "BK": terms(operand, middle), **options(8)}


def options(warps: int, stages: int = 2) -> dict[str, Any]:
    from ...triton_support import FP_FUSION

    return {"num_warps": warps, "num_stages": stages, **FP_FUSION}
