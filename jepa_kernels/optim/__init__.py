"""Optimizers built on the ops."""

from __future__ import annotations

from .adamw_ema import AdamWEMA

__all__ = ["AdamWEMA"]
