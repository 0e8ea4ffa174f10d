"""C++ CPU backend: csrc/masked_attention/cpu through the stable-ABI binding."""

from __future__ import annotations

import torch

from ... import native
from .call import Call, dtype_reasons, head_dim_reasons


def unsupported_reasons(call: Call) -> list[str]:
    return (
        native.cpu_unavailable_reasons(call.device_type)
        + dtype_reasons(call, (torch.float32, torch.bfloat16))
        + head_dim_reasons(call)
    )


def forward(
    query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, grid, scale
):
    return torch.ops.jepa_kernels_native.masked_attention_cpu_fwd(
        query,
        key,
        value,
        query_ids,
        key_ids,
        cu_seqlens_q,
        cu_seqlens_k,
        rope_table,
        grid,
        scale,
        native.isa(),
    )


def backward(
    grad_out,
    query,
    key,
    value,
    query_ids,
    key_ids,
    cu_seqlens_q,
    cu_seqlens_k,
    rope_table,
    out,
    lse,
    grid,
    scale,
):
    return torch.ops.jepa_kernels_native.masked_attention_cpu_bwd(
        grad_out,
        query,
        key,
        value,
        query_ids,
        key_ids,
        cu_seqlens_q,
        cu_seqlens_k,
        rope_table,
        out,
        lse,
        grid,
        scale,
        native.isa(),
    )
