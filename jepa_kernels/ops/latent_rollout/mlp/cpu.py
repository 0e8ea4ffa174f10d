"""C++ CPU backend of a residual MLP's rollout, plain matrix products through torch."""

from __future__ import annotations

from ..kernel_backend import kernel_backend
from ..native_ops import cpu_unsupported
from . import rollout
from .native import Native

BACKEND = kernel_backend(
    "cpu", ("cpu",), cpu_unsupported, rollout, Native(saves_signs=True), widens=True
)
