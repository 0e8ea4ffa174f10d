"""C++ CPU backend of sliced_gaussianity, products through torch.

A thread turns a few rows of 16 directions at a time: their powers and sums stay in registers.
"""

from __future__ import annotations

from .native_ops import cpu_backend

BACKEND = cpu_backend()
