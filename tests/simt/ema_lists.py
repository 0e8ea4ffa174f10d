"""Lists of tensors whose memory ctypes calls may read and write."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 2 * 256 * 8  # elements that a block owns
ROUNDINGS = ("nearest", "kahan", "stochastic")


def view(tensor: torch.Tensor) -> np.ndarray:
    """The same memory for NumPy; bfloat16 as its bits."""
    return (
        tensor.view(torch.int16).numpy().view(np.uint16)
        if tensor.dtype == torch.bfloat16
        else tensor.numpy()
    ).reshape(-1)


def draw(sizes: Sequence[int], dtype: torch.dtype, seed: int, shift: int = 0) -> list[torch.Tensor]:
    """Tensors whose memory starts `shift` elements after an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size + shift, generator=generator).to(dtype)[shift:] for size in sizes]
