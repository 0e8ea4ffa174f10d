"""Measured cases in which `auto` passes a backend by. Each names the committed record that shows it
(benchmarks/results)."""

from __future__ import annotations

from ...backend import Preference

PREFERENCES: tuple[Preference, ...] = ()
