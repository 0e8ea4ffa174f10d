"""A small call stays small: the Python functions it enters are counted, which no busy machine
disturbs. `python -m benchmarks.bench_overhead` has the times."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

import jepa_kernels
from benchmarks.bench_overhead import Attention
from jepa_kernels import native

if not native.available():
    pytest.skip(str(native.reason()), allow_module_level=True)


def entered(call: Callable[[], object]) -> int:
    """Python functions entered by a call that has been made before: the fewest of three times,
    since a finalizer of something else may run in between."""
    call()
    return min(_entered_once(call) for _ in range(3))


def _entered_once(call: Callable[[], object]) -> int:
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def lists(tensors: int) -> Callable[[], None]:
    targets, sources = ([torch.randn(16, 16) for _ in range(tensors)] for _ in range(2))
    return lambda: jepa_kernels.ema_update_(targets, sources, 0.99)


def test_attention_of_16_tokens() -> None:
    case = Attention("cpu")
    with torch.no_grad():
        assert entered(case.call) <= FORWARD
    assert entered(case.differentiated(case.call, case.ours)) <= FORWARD_BACKWARD


def test_an_update_enters_no_function_per_tensor() -> None:
    assert entered(lists(60)) <= UPDATE
    assert entered(lists(120)) == entered(lists(60))


# What was entered when this was written, and a few more: a change that needs more says why here.
FORWARD, FORWARD_BACKWARD, UPDATE = 52, 142, 24
