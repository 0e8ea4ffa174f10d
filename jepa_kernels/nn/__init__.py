"""Modules built on the ops."""

from __future__ import annotations

from .attention import CrossAttention, RoPEAttention

__all__ = ["CrossAttention", "RoPEAttention"]
