"""Marks calls of an op whose arguments the public function has just checked, so that lists of
hundreds of tensors are not checked twice.

A compiled graph calls the op without the public function, and so does a direct caller of torch.ops:
those calls are checked in the op.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _State(threading.local):
    def __init__(self) -> None:
        self.active = False


_state = _State()


@contextlib.contextmanager
def arguments_checked() -> Iterator[None]:
    before, _state.active = _state.active, True
    try:
        yield
    finally:
        _state.active = before


def are_arguments_checked() -> bool:
    return _state.active
