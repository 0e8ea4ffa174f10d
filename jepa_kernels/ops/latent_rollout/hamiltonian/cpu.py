"""C++ CPU backend of a Hamiltonian's rollout, plain matrix products through torch."""

from __future__ import annotations

from ..native_ops import cpu_backend
from . import rollout
from .native import Native

BACKEND = cpu_backend(rollout, Native(saves_signs=True))
