"""Triton backend: NVIDIA GPUs from compute capability 8.0, and CPU tensors under
TRITON_INTERPRET=1. The kernels are imported on first use.

One launch for each combination of dtypes in the list. Nothing reads a tensor's values on the host.
"""

from __future__ import annotations

from ... import triton_runtime
from ...backend import Backend, Reason
from ..ema.lists import ROUNDINGS
from ..ema.triton_launch import by_dtypes, dtype_of, on_the_device, weights
from ..ema.triton_table import table
from .inputs import Inputs, kernel_reasons


def unsupported(inputs: Inputs) -> list[Reason]:
    return triton_runtime.unavailable_reasons(inputs.device_type) + kernel_reasons(inputs)


def forward(inputs: Inputs) -> None:
    from .triton_kernels import BLOCK, FUSION, ema_update_kernel

    device, seed = inputs.targets[0].device, inputs.seed
    with (
        inputs.flat() as (targets, copies, compensations, sources),
        triton_runtime.device_of(inputs.targets[0]),
    ):
        pointer, keep, take = weights(inputs.momentum, device)
        seed = None if seed is None else on_the_device(seed, device)
        none = [None] * len(targets)
        given_copies, given_compensations = copies or none, compensations or none
        for places in by_dtypes(targets, sources, given_copies):
            first = places[0]
            arrays = (targets, given_copies, given_compensations, sources)
            chosen = [[values[i] for i in places] for values in arrays]
            lists = table(chosen, [inputs.streams[i] for i in places], BLOCK)
            ema_update_kernel[(lists.chunks.shape[0],)](
                lists.rows,
                lists.chunks,
                pointer,
                keep,
                take,
                seed,
                TARGET=dtype_of(targets[first]),
                SOURCE=dtype_of(sources[first]),
                COPY=dtype_of(given_copies[first]),
                ROUNDING=ROUNDINGS.index(inputs.rounding),
                ALIGNED=lists.aligned,
                BLOCK=BLOCK,
                num_warps=4,
                **FUSION,
            )


BACKEND = Backend("triton", triton_runtime.DEVICES, unsupported, forward)
