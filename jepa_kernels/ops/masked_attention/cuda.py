"""CUDA C++ backend: csrc/masked_attention/cuda, opened lazily behind its C ABI by the stable-ABI
binding."""

from __future__ import annotations

import torch

from ... import native
from ...backend import Backend, Reason
from .inputs import Inputs, rows_of_channels, shape_reasons, times_reasons

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(inputs: Inputs) -> list[Reason]:
    return (
        native.cuda_unavailable_reasons(inputs.device_type)
        + shape_reasons(inputs, _DTYPES)
        + times_reasons(inputs)
    )


def forward(inputs: Inputs):
    return native.call(
        torch.ops.jepa_kernels_native.masked_attention_cuda_fwd,
        *inputs.tensors(),
        inputs.grid,
        inputs.scale,
    )


def backward(inputs: Inputs, saved, grad_out, needs):
    out, lse = saved
    return native.call(
        torch.ops.jepa_kernels_native.masked_attention_cuda_bwd,
        rows_of_channels(grad_out),
        *inputs.tensors(),
        out,
        lse,
        inputs.grid,
        inputs.scale,
    )


BACKEND = Backend("cuda", ("cuda",), unsupported, forward, backward)
