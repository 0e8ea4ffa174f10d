"""CUDA C++ backend of sliced_gaussianity, products through torch.

A lane owns a direction, so rows are read in whole lines; a warp turns a few rows at a time, and its
sums stay in shared memory.
"""

from __future__ import annotations

from .native_ops import cuda_backend

BACKEND = cuda_backend()
