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


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    results: tuple[torch.Tensor, torch.Tensor] = native.call(
        native.ops.masked_attention_cuda_fwd,
        *inputs.tensors(),
        inputs.grid,
        inputs.scale,
    )
    return results


def backward(
    inputs: Inputs, saved: list[torch.Tensor], grad_out: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, lse = saved
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = native.call(
        native.ops.masked_attention_cuda_bwd,
        rows_of_channels(grad_out),
        *inputs.tensors(),
        out,
        lse,
        inputs.grid,
        inputs.scale,
    )
    return grads


BACKEND = Backend("cuda", ("cuda",), unsupported, forward, backward)
