"""CUDA C++ backend: csrc/adamw_ema/cuda, opened lazily behind its C ABI by the stable-ABI
binding."""

from __future__ import annotations

from ... import native
from ...backend import Backend, Reason
from .inputs import Inputs, kernel_reasons


def unsupported(inputs: Inputs) -> list[Reason]:
    return native.cuda_unavailable_reasons(inputs.device_type) + kernel_reasons(inputs)


def forward(inputs: Inputs) -> None:
    with inputs.flat() as flat:
        native.call(
            native.ops.adamw_ema_cuda_,
            *flat.native_arguments(),
        )


BACKEND = Backend("cuda", ("cuda",), unsupported, forward)
