"""CUDA C++ backend of a Hamiltonian's rollout, plain matrix products through torch.

A block owns 16 rows and takes them through every step in one launch, in the backward pass through
one half-step; its hidden state stays in shared memory. So do the matrices that a launch reads more
than once, wherever they fit what the device lends to a block.
"""

from __future__ import annotations

from ..native_ops import cuda_backend
from . import rollout
from .native import Native

WIDEST = 448

BACKEND = cuda_backend(rollout, Native(saves_signs=False), WIDEST)
