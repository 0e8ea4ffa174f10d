"""CUDA C++ backend: csrc/masked_attention/cuda, opened lazily behind its C ABI by the stable-ABI
binding."""

from __future__ import annotations

import torch

from ... import native
from .call import Call, dtype_reasons, head_dim_reasons


def unsupported_reasons(call: Call) -> list[str]:
    reasons = native.cuda_unavailable_reasons(call.device_type)
    return (
        reasons
        + dtype_reasons(call, (torch.float32, torch.bfloat16, torch.float16))
        + head_dim_reasons(call)
    )


def forward(
    query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, grid, scale
):
    return torch.ops.jepa_kernels_native.masked_attention_cuda_fwd(
        query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, grid, scale
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
    return torch.ops.jepa_kernels_native.masked_attention_cuda_bwd(
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
    )
