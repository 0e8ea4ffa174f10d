"""Finds the bench files: every `bench_<op>.py` of this folder that has a `comparisons(options)`
function."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator

import benchmarks
from benchmarks.harness import Comparison, Options

Comparisons = Callable[[Options], Iterator[Comparison]]


def bench_names() -> list[str]:
    """Names of ops (and host parts) that have a bench file, in alphabetical order."""
    return sorted(
        info.name.removeprefix("bench_")
        for info in pkgutil.iter_modules(benchmarks.__path__)
        if info.name.startswith("bench_")
    )


def comparisons_of(op: str) -> Comparisons | None:
    """The `comparisons` function of an op's bench file; None where a bench file is built in another
    way (a script of its own)."""
    module = importlib.import_module(f"benchmarks.bench_{op}")
    return getattr(module, "comparisons", None)
