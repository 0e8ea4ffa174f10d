"""Triton backend: NVIDIA GPUs from compute capability 8.0, and CPU tensors under
TRITON_INTERPRET=1. The kernels are imported on first use.

One launch for each combination of dtypes in the list. Nothing reads a tensor's values on the host.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ... import triton_runtime
from .call import ROUNDINGS, Call, dtype_reasons
from .memory import Flat
from .triton_table import table


def unsupported_reasons(call: Call) -> list[str]:
    return triton_runtime.unavailable_reasons(call.device_type) + dtype_reasons(call.dtypes)


def forward(targets, sources, momentum, copies, compensations, streams, rounding, seed) -> None:
    from .triton_kernels import BLOCK, FUSION, ema_update_kernel

    flat = Flat(
        written=(targets, copies, compensations),
        read=(sources,),
        row_major=rounding == "stochastic",
    )
    with flat as (targets, copies, compensations, sources), on_device(targets[0]):
        pointer, keep, take = weights(momentum, targets[0].device)
        seed = None if seed is None else on_the_device(seed, targets[0].device)
        none = [None] * len(targets)
        copies, compensations = copies or none, compensations or none
        for places in by_dtypes(targets, sources, copies):
            first = places[0]
            chosen = [
                [values[i] for i in places] for values in (targets, copies, compensations, sources)
            ]
            lists = table(chosen, [streams[i] for i in places], BLOCK)
            ema_update_kernel[(lists.chunks.shape[0],)](
                lists.rows,
                lists.chunks,
                pointer,
                keep,
                take,
                seed,
                TARGET=dtype_of(targets[first]),
                SOURCE=dtype_of(sources[first]),
                COPY=dtype_of(copies[first]),
                ROUNDING=ROUNDINGS.index(rounding),
                ALIGNED=lists.aligned,
                BLOCK=BLOCK,
                num_warps=4,
                **FUSION,
            )


def by_dtypes(*lists) -> list[list[int]]:
    """Places of the entries of each combination of dtypes."""
    places: dict[tuple, list[int]] = {}
    for i, entry in enumerate(zip(*lists, strict=True)):
        places.setdefault(tuple(None if t is None else t.dtype for t in entry), []).append(i)
    return list(places.values())


def dtype_of(tensor: torch.Tensor | None) -> Any:
    """The Triton type of a tensor's elements."""
    import triton.language as tl

    return (
        None
        if tensor is None
        else {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
            tensor.dtype
        ]
    )


def weights(
    momentum: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor | None, float, float]:
    """Both weights of the average: by value for a momentum on the host, as a pointer for one on the
    device."""
    if momentum.device.type == "cpu" and device.type != "cpu":
        return None, float(momentum), 1.0 - float(momentum)
    return torch.stack((momentum, 1.0 - momentum)).to(torch.float32), 0.0, 0.0


def on_the_device(scalar: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A 0-d tensor on `device`; one from the host travels as a kernel argument, so nothing
    waits."""
    if scalar.device == device:
        return scalar
    return torch.full((), scalar.item(), dtype=scalar.dtype, device=device)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
