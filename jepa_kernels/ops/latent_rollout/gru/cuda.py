"""CUDA C++ backend of a GRU's rollout, plain matrix products through torch.

A block owns 16 rows and takes them through every step in one launch; their state stays in shared
memory. So does W_s wherever it fits what the device lends to a block.
"""

from __future__ import annotations

from ..native_ops import cuda_backend
from . import rollout
from .native import Native

WIDEST = 640

BACKEND = cuda_backend(rollout, Native(), WIDEST)
