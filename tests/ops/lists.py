"""What the tests of list ops share: lists of tensors on the device of a backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from tests.ops.backends import device_of


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(
    sizes: Sequence[Sequence[int]], dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tuple(size), generator=generator, dtype=torch.float64).to(dtype)
        for size in sizes
    ]


def run_here(
    backend: str | None, values: Sequence[torch.Tensor], op: str = "ema_update"
) -> list[torch.Tensor]:
    """Copies of `values`, strides kept, on the device that `backend` needs."""
    device = "cpu" if backend is None else device_of(op, backend)
    return [v.detach().clone().to(device) for v in values]
