"""C++ CPU backend: csrc/ema_update/cpu through the stable-ABI binding, one parallel region over
the whole list."""

from __future__ import annotations

import torch

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


_update_plain = native.overload("ema_update_plain_cpu_")


def plain(inputs: Inputs) -> bool:
    if _update_plain is None or inputs.copies or inputs.rounding != "nearest":
        return False
    momentum = inputs.momentum
    if isinstance(momentum, torch.Tensor) and not momentum.is_cpu:
        return False
    made: bool = _update_plain(inputs.targets, inputs.sources, float(momentum), native.isa())
    return made


BACKEND = Backend("cpu", ("cpu",), unsupported, forward, plain=plain)
