"""Modules built on the ops."""

from __future__ import annotations

from .attention import CrossAttention, RoPEAttention
from .cache import KeyValueCache
from .ema import EMATeacher
from .gaussianity import LeJEPALoss, SlicedGaussianity, lejepa_loss
from .momentum import CosineMomentum, LinearMomentum
from .patches import VisiblePatchEmbed

__all__ = [
    "CosineMomentum",
    "CrossAttention",
    "EMATeacher",
    "KeyValueCache",
    "LeJEPALoss",
    "LinearMomentum",
    "RoPEAttention",
    "SlicedGaussianity",
    "VisiblePatchEmbed",
    "lejepa_loss",
]
