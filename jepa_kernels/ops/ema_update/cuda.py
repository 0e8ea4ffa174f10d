"""CUDA C++ backend: csrc/ema_update/cuda, opened lazily behind its C ABI by the stable-ABI
binding."""

from __future__ import annotations

import torch

from ... import native
from .call import ROUNDINGS, Call, dtype_reasons
from .memory import Flat


def unsupported_reasons(call: Call) -> list[str]:
    return native.cuda_unavailable_reasons(call.device_type) + dtype_reasons(call.dtypes)


def forward(targets, sources, momentum, copies, compensations, streams, rounding, seed) -> None:
    flat = Flat(
        written=(targets, copies, compensations),
        read=(sources,),
        row_major=rounding == "stochastic",
    )
    with flat as (targets, copies, compensations, sources):
        torch.ops.jepa_kernels_native.ema_update_cuda_(
            targets,
            sources,
            momentum,
            copies,
            compensations,
            streams,
            ROUNDINGS.index(rounding),
            seed,
        )
