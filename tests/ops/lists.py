"""What the tests of list ops share: which backends run here, and lists of tensors on the device of a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jepa_kernels import native, triton_runtime

GPU = torch.cuda.is_available()
BACKENDS = ("torch", *(("cpu",) if native.available() else ()), *(("triton", "cuda") if GPU else ()))


def tensors(sizes: Sequence[Sequence[int]], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(size), generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def run_here(backend: str | None, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of `values`, strides kept, on the device that `backend` needs."""
    device = "cuda" if backend in ("triton", "cuda") and not triton_runtime.interpreting() else "cpu"
    return [v.detach().clone().to(device) for v in values]
