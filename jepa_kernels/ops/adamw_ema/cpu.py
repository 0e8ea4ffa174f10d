"""C++ CPU backend: csrc/adamw_ema/cpu through the stable-ABI binding, one parallel region over
the whole list."""

from __future__ import annotations

from ... import native
from ...backend import Backend, Reason
from .inputs import Inputs, kernel_reasons


def unsupported(inputs: Inputs) -> list[Reason]:
    return native.cpu_unavailable_reasons(inputs.device_type) + kernel_reasons(inputs)


def forward(inputs: Inputs) -> None:
    with inputs.flat() as flat:
        native.call(
            native.ops.adamw_ema_cpu_,
            *flat.native_arguments(),
            native.isa(),
        )


BACKEND = Backend("cpu", ("cpu",), unsupported, forward)
