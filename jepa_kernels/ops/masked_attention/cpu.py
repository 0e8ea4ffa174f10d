"""C++ CPU backend: csrc/masked_attention/cpu through the stable-ABI binding."""

from __future__ import annotations

import torch

from ... import native
from ...backend import Backend, Reason
from .inputs import Inputs, rows_of_channels, shape_reasons, times_reasons

_DTYPES = (torch.float32, torch.bfloat16)


def unsupported(inputs: Inputs) -> list[Reason]:
    return (
        native.cpu_unavailable_reasons(inputs.device_type)
        + shape_reasons(inputs, _DTYPES)
        + times_reasons(inputs)
    )


def forward(inputs: Inputs):
    return native.call(
        torch.ops.jepa_kernels_native.masked_attention_cpu_fwd,
        *inputs.tensors(),
        inputs.grid,
        inputs.scale,
        native.isa(),
    )


def backward(inputs: Inputs, saved, grad_out, needs):
    out, lse = saved
    return native.call(
        torch.ops.jepa_kernels_native.masked_attention_cpu_bwd,
        rows_of_channels(grad_out),
        *inputs.tensors(),
        out,
        lse,
        inputs.grid,
        inputs.scale,
        native.isa(),
    )


BACKEND = Backend("cpu", ("cpu",), unsupported, forward, backward, checks_values=True)
