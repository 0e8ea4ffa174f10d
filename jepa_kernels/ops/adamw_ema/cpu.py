"""C++ CPU backend: csrc/adamw_ema/cpu through the stable-ABI binding, one parallel region over
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
    with inputs.flat() as flat:
        native.call(
            torch.ops.jepa_kernels_native.adamw_ema_cpu_,
            flat.params,
            flat.grads,
            flat.exp_avgs,
            flat.exp_avg_sqs,
            flat.steps,
            flat.hyper,
            flat.groups,
            flat.targets,
            flat.momentum,
            flat.copies,
            flat.compensations,
            flat.streams,
            ROUNDINGS.index(flat.rounding),
            flat.seed,
            flat.grad_scale,
            flat.found_inf,
            native.isa(),
        )


BACKEND = Backend("cpu", ("cpu",), unsupported, forward)
