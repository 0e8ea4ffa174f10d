"""FlashAttention 3, FlashAttention 4 and torch's two flash ops as functions for a CPU, with their
signatures and their habits, on scaled_dot_product_attention.

They hold callers to what the real kernels expect: int32 offsets, rows that start on 16 bytes,
lengths that bound every sequence. Their backward is computed from the out and lse that it is given.
Like the real ones, they leave rows that belong to no sequence unwritten.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

# What the last calls were told, newest last.
calls: list[dict[str, Any]] = []


def _attend(q, k, v, scale):
    """One sequence ``[rows, heads, head_dim]`` in float32: out and lse ``[heads, rows]``."""
    q, k, v = (t.float().transpose(0, 1) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
    return out.transpose(0, 1), (q @ k.transpose(1, 2) * scale).logsumexp(-1)


def _check(told: dict[str, Any], *panels: torch.Tensor) -> None:
    calls.append(told)
    for x in panels:
        assert x.dtype in (torch.bfloat16, torch.float16), x.dtype
        assert x.stride(-1) == 1, x.stride()
        assert all(stride % 8 == 0 for stride in x.stride()[:-1]), x.stride()
        assert x.data_ptr() % 16 == 0
    for offsets in (told["cu_q"], told["cu_k"]):
        if offsets is not None:
            assert offsets.dtype == torch.int32
            assert offsets.is_contiguous()


def _sequences(q, k, told: dict[str, Any]) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries and the keys of each sequence, of tensors with batch and rows in one."""
    if told["cu_q"] is None:
        batch = told["batch"]
        rows_q, rows_k = q.shape[0] // batch, k.shape[0] // batch
        for i in range(batch):
            yield slice(i * rows_q, (i + 1) * rows_q), slice(i * rows_k, (i + 1) * rows_k)
        return
    ends = (told["cu_q"].tolist(), told["cu_k"].tolist())
    for (a, b), (c, d) in zip(*(pairwise(e) for e in ends), strict=True):
        assert b - a <= told["max_q"]
        assert d - c <= told["max_k"]
        yield slice(a, b), slice(c, d)


def _forward(q, k, v, told: dict[str, Any], without_keys: float):
    _check(told, q, k, v)
    told["batch"] = q.shape[0] if q.dim() == 4 else 1
    shape = q.shape
    q, k, v = (t.flatten(0, 1) if t.dim() == 4 else t for t in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0])
    for rows, keys in _sequences(q, k, told):
        if keys.start == keys.stop:
            out[rows], lse[:, rows] = 0, without_keys
        else:
            out[rows], lse[:, rows] = _attend(q[rows], k[keys], v[keys], told["scale"])
    if len(shape) == 4:
        lse = lse.unflatten(1, shape[:2]).transpose(0, 1).contiguous()
    return out.view(shape), lse


def _backward(grad, q, k, v, out, lse, told: dict[str, Any], grads=None):
    _check(told, grad, q, k, v, out)
    told["batch"] = q.shape[0] if q.dim() == 4 else 1
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    shapes = [t.shape for t in (q, k, v)]
    if q.dim() == 4:
        lse = lse.transpose(0, 1).flatten(1, 2)
    grad, q, k, v, out = (t.flatten(0, 1) if t.dim() == 4 else t for t in (grad, q, k, v, out))
    if grads is None:
        grads = [torch.empty(shape, dtype=q.dtype) for shape in shapes]
    flat = [g.view(t.shape) for g, t in zip(grads, (q, k, v), strict=True)]
    for rows, keys in _sequences(q, k, told):
        # Written out, from the out and lse of the forward: below the dispatcher is no autograd.
        g, query, key, value, done = (
            t.float().transpose(0, 1) for t in (grad[rows], q[rows], k[keys], v[keys], out[rows])
        )
        weights = (query @ key.transpose(1, 2) * told["scale"] - lse[:, rows, None]).exp()
        delta = (g * done).sum(-1, keepdim=True)
        scores = weights * (g @ value.transpose(1, 2) - delta) * told["scale"]
        found = (scores @ key, scores.transpose(1, 2) @ query, weights.transpose(1, 2) @ g)
        for target, part, gradient in zip(flat, (rows, keys, keys), found, strict=True):
            target[part] = gradient.transpose(0, 1)
    return tuple(grads)


def _told(scale, cu_q=None, cu_k=None, max_q=None, max_k=None, **more: Any) -> dict[str, Any]:
    names = {"scale": scale, "cu_q": cu_q, "cu_k": cu_k, "max_q": max_q, "max_k": max_k}
    return names | more


def flash_attention_3() -> types.ModuleType:
    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        out, lse = _forward(q, k, v, _told(softmax_scale), -torch.inf)
        return (out, lse) if return_attn_probs else out

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        told = _told(softmax_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = _forward(q, k, v, told, -torch.inf)
        return (out, lse) if return_attn_probs else out

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        sequed_q=None,
        sequed_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dq=None,
        dk=None,
        dv=None,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        told = _told(softmax_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        told["deterministic"] = deterministic
        _backward(dout, q, k, v, out, softmax_lse, told, [dq, dk, dv])
        return torch.empty(0)

    return _module("flash_attn_interface", locals())


def flash_attention_4() -> types.ModuleType:
    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        aux_tensors=None,
        aux_scalars=None,
        block_sparse_tensors=None,
        block_sparse_tensors_bwd=None,
        return_lse=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        out, lse = _forward(q, k, v, _told(softmax_scale), -torch.inf)
        return out, lse if return_lse else None

    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        block_sparse_tensors=None,
        aux_tensors=None,
        aux_scalars=None,
        return_lse=False,
        scheduler_metadata=None,
        seqlen_k_per_split=None,
        disable_scheduler_metadata=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        told = _told(softmax_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = _forward(q, k, v, told, -torch.inf)
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        m_block_size=64,
        n_block_size=128,
        num_threads=256,
        pack_gqa=False,
        num_stages_Q=2,
        num_stages_dO=2,
        SdP_swapAB=False,
        dKV_swapAB=False,
        dQ_swapAB=False,
        AtomLayoutMSdP=2,
        AtomLayoutNdKV=2,
        AtomLayoutMdQ=2,
        V_in_regs=False,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic=False,
        dq=None,
        dk=None,
        dv=None,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        aux_tensors=None,
        aux_scalars=None,
        block_sparse_tensors=None,
        dlse=None,
        learnable_sink=None,
    ):
        told = _told(softmax_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        told["deterministic"] = deterministic
        return _backward(dout, q, k, v, out, lse, told)

    return _module("flash_attn.cute.interface", locals())


def _module(name: str, functions: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(functions)
    return module


def aten_forward(
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
    alibi_slopes=None,
    block_table=None,
    num_splits=None,
):
    assert dropout_p == 0.0
    assert not is_causal
    assert {window_size_left, window_size_right} <= {None, -1}
    told = _told(scale, cum_seq_q, cum_seq_k, max_q, max_k)
    # As FlashAttention 2 does, the lse of queries without keys is +inf.
    out, lse = _forward(query, key, value, told, torch.inf)
    rest = [torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)]
    return (out, lse, *rest)


def aten_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    assert dropout_p == 0.0
    assert not is_causal
    told = _told(scale, cum_seq_q, cum_seq_k, max_q, max_k)
    return _backward(grad_out, query, key, value, out, logsumexp, told)
