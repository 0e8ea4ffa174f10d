"""C++ CPU backend: csrc/ema_update/cpu through the stable-ABI binding, one parallel region over
the whole list."""

from __future__ import annotations

from ... import native
from ...backend import Backend, Reason
from ..ema.lists import ROUNDINGS
from .inputs import Inputs, kernel_reasons


def unsupported(inputs: Inputs) -> list[Reason]:
    return native.cpu_unavailable_reasons(inputs.device_type) + kernel_reasons(inputs)


def forward(inputs: Inputs) -> None:
    with inputs.flat() as (targets, copies, compensations, sources):
        native.call(
            native.ops.ema_update_cpu_,
            targets,
            sources,
            inputs.momentum,
            copies,
            compensations,
            inputs.streams,
            ROUNDINGS.index(inputs.rounding),
            inputs.seed,
            native.isa(),
        )


BACKEND = Backend("cpu", ("cpu",), unsupported, forward)
