"""C++ CPU backend: csrc/masked_attention/cpu through the stable-ABI binding."""

from __future__ import annotations

import torch

from ... import native
from ...backend import Backend, Reason
from .inputs import Inputs, rows_of_channels, shape_reasons

_DTYPES = (torch.float32, torch.bfloat16)
_forward = native.overload("masked_attention_cpu_fwd")
_backward = native.overload("masked_attention_cpu_bwd")


def unsupported(inputs: Inputs) -> list[Reason]:
    return native.cpu_unavailable_reasons(inputs.device_type) + shape_reasons(inputs, _DTYPES)


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        results: tuple[torch.Tensor, torch.Tensor] = _forward(
            *inputs.tensors(),
            inputs.query_times,
            inputs.key_times,
            inputs.grid,
            inputs.scale,
            inputs.window,
            native.isa(),
        )
    except RuntimeError as error:
        raise native.meant(error) from None
    return results


def backward(
    inputs: Inputs, saved: list[torch.Tensor], grad_out: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, lse = saved
    try:
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _backward(
            rows_of_channels(grad_out),
            *inputs.tensors(),
            inputs.query_times,
            inputs.key_times,
            out,
            lse,
            inputs.grid,
            inputs.scale,
            inputs.window,
            native.isa(),
        )
    except RuntimeError as error:
        raise native.meant(error) from None
    return grads


BACKEND = Backend("cpu", ("cpu",), unsupported, forward, backward, checks_values=True)
