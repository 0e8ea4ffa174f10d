"""CUDA C++ backend: csrc/ema_update/cuda, opened lazily behind its C ABI by the stable-ABI
binding."""

from __future__ import annotations

from ... import native
from ...backend import Backend, Reason
from ..ema.lists import ROUNDINGS
from .inputs import Inputs, kernel_reasons


def unsupported(inputs: Inputs) -> list[Reason]:
    return native.cuda_unavailable_reasons(inputs.device_type) + kernel_reasons(inputs)


def forward(inputs: Inputs) -> None:
    with inputs.flat() as (targets, copies, compensations, sources):
        native.call(
            native.ops.ema_update_cuda_,
            targets,
            sources,
            inputs.momentum,
            copies,
            compensations,
            inputs.streams,
            ROUNDINGS.index(inputs.rounding),
            inputs.seed,
        )


BACKEND = Backend("cuda", ("cuda",), unsupported, forward)
