"""Is the GPU one that the kernels are written for? Host facts only."""

from __future__ import annotations

import functools

import torch

OLDEST = (8, 0)  # mma.sync on bfloat16, cp.async, ldmatrix


def first_device() -> tuple[int, int]:
    """Compute capability of the first GPU: a machine with GPUs of two generations is out of scope,
    and a fake tensor has no index. `OLDEST` where there is none."""
    return _first_device()


# What torch.compiler.assume_constant_result sets; calling that would import Dynamo, and Triton with
# it, wherever this package is imported.
first_device._dynamo_marked_constant = True  # type: ignore[attr-defined] # an attribute for Dynamo


@functools.cache
def _first_device() -> tuple[int, int]:
    return torch.cuda.get_device_capability(0) if torch.cuda.is_available() else OLDEST


def reasons() -> list[str]:
    """Why this machine's GPU cannot run the kernels; empty where it can, or where there is none."""
    found = first_device()
    if found >= OLDEST or torch.version.hip is not None:
        return []
    return ["the GPU must have compute capability 8.0 or later, got {}.{}".format(*found)]
