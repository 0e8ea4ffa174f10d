"""Fast eager composition: table rotation and scaled_dot_product_attention, one call per packed
sequence.

The baseline that kernels must beat, and what runs where no kernel does. Uses PyTorch's own
autograd; inside a compiled graph packed calls go through the op, because their loop reads lengths,
and backward then recomputes the composition.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from ... import checks
from ...rope3d import Rope3D
from .call import Call


def unsupported_reasons(call: Call) -> list[str]:
    return []


def traceable(cu_seqlens_q: torch.Tensor | None) -> bool:
    """True where `compose` may run in the caller's graph: always when dense, outside torch.compile
    when packed."""
    return cu_seqlens_q is None or not torch.compiler.is_compiling()


def compose(
    query,
    key,
    value,
    query_ids,
    key_ids,
    cu_seqlens_q,
    cu_seqlens_k,
    rope: Rope3D | None,
    scale: float,
    return_lse: bool,
):
    """out and lse (None unless asked for) of a checked call, with ordinary autograd."""
    table = None if rope is None else rope.table(query.shape[-1], query.device)
    grid = (0, 0, 0) if rope is None else rope.grid
    if not torch.compiler.is_compiling():
        _check_values(query, key, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope)
    return _compose(
        query,
        key,
        value,
        query_ids,
        key_ids,
        cu_seqlens_q,
        cu_seqlens_k,
        table,
        grid,
        scale,
        return_lse,
    )


def forward(
    query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, grid, scale
):
    out, lse = _compose(
        query,
        key,
        value,
        query_ids,
        key_ids,
        cu_seqlens_q,
        cu_seqlens_k,
        rope_table,
        tuple(grid),
        scale,
        True,
    )
    return out.contiguous(), lse.contiguous()


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
    """The softmax gradient written out: inside an op there is no autograd to ask. O(Nq * Nk) memory
    for one sequence at a time."""
    grid = tuple(grid)
    if rope_table is not None:
        query, key = (
            rotate(query, query_ids, rope_table, grid),
            rotate(key, key_ids, rope_table, grid),
        )
    delta = (grad_out.float() * out.float()).sum(-1).movedim(-1, -2)
    if cu_seqlens_q is None:
        grads = _attend_backward(grad_out, query, key, value, delta, lse, scale)
    else:
        lengths_q, lengths_k = (
            _lengths(cu_seqlens_q, query.shape[0]),
            _lengths(cu_seqlens_k, key.shape[0]),
        )
        by_query = [t.split(lengths_q) for t in (grad_out, query)] + [
            t.split(lengths_q, dim=-1) for t in (delta, lse)
        ]
        by_key = [t.split(lengths_k) for t in (key, value)]
        pieces = [
            _attend_backward(g, q, k, v, d, m, scale)
            for g, q, d, m, k, v in list(zip(*by_query, *by_key, strict=True))[:-1]
        ]
        slack = [
            t.new_zeros((n, *t.shape[1:]))
            for t, n in ((query, lengths_q[-1]), (key, lengths_k[-1]), (value, lengths_k[-1]))
        ]
        grads = (
            tuple(
                torch.cat([*parts, end])
                for parts, end in zip(zip(*pieces, strict=True), slack, strict=True)
            )
            if pieces
            else slack
        )
    grad_query, grad_key, grad_value = grads
    if rope_table is not None:
        grad_query = _rotate_transposed(grad_query, query_ids, rope_table, grid)
        grad_key = _rotate_transposed(grad_key, key_ids, rope_table, grid)
    return tuple(g.contiguous() for g in (grad_query, grad_key, grad_value))


def _attend_backward(grad_out, query, key, value, delta, lse, scale: float):
    """Gradients of `_attend` for ``[..., N, heads, head_dim]``, with delta and lse ``[..., heads,
    Nq]``."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    grad_out, query, key, value = (
        t.to(wide).transpose(-3, -2) for t in (grad_out, query, key, value)
    )
    # A sequence without keys has lse -inf and no column to weigh, so no NaN can arise.
    weights = (query @ key.transpose(-1, -2) * scale - lse[..., None]).exp()
    grad_scores = weights * (grad_out @ value.transpose(-1, -2) - delta[..., None]) * scale
    grads = (
        grad_scores @ key,
        grad_scores.transpose(-1, -2) @ query,
        weights.transpose(-1, -2) @ grad_out,
    )
    return tuple(g.transpose(-3, -2).to(dtype) for g in grads)


def rotate(
    x: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, grid: tuple[int, int, int]
) -> torch.Tensor:
    """R(x, ids) by the table of `Rope3D.table`, for ``[..., N, heads, head_dim]`` and ids ``[...,
    N]``."""
    cos, sin = _angles(ids, table, grid, x.dtype)
    head, tail = x.tensor_split((cos.shape[-1],), dim=-1)
    even, odd = head.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat(
        (head * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin, tail), dim=-1
    )


def _rotate_transposed(
    grad: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, grid: tuple[int, int, int]
) -> torch.Tensor:
    """The gradient of `rotate`: the transpose, which is the inverse only for the interleaved
    layout."""
    cos, sin = _angles(ids, table, grid, grad.dtype)
    head, tail = grad.tensor_split((cos.shape[-1],), dim=-1)
    even, odd = (head * sin).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((head * cos + torch.stack((odd, -even), dim=-1).flatten(-2), tail), dim=-1)


def _angles(
    ids: torch.Tensor, table: torch.Tensor, grid: tuple[int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every rotated channel of every token, ``[..., N, 1, 3 m]``; 1 and 0 where
    the id is -1."""
    frames, height, width = grid
    spatial = height * width
    place = ids.clamp(min=0).long()
    rows = (place // spatial, frames + place % spatial // width, frames + height + place % width)
    cos, sin = torch.cat([table[:, row] for row in rows], dim=-1).to(dtype)
    unrotated = (ids < 0)[..., None]
    return cos.masked_fill(unrotated, 1.0)[..., None, :], sin.masked_fill(unrotated, 0.0)[
        ..., None, :
    ]


def _check_values(
    query, key, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope: Rope3D | None
) -> None:
    if rope is not None:
        checks.token_ids_in_grid("masked_attention", "query_ids", query_ids, rope.num_tokens)
        if key_ids is not query_ids:
            checks.token_ids_in_grid("masked_attention", "key_ids", key_ids, rope.num_tokens)
    if cu_seqlens_q is not None:
        checks.offsets_valid("masked_attention", "cu_seqlens_q", cu_seqlens_q, query.shape[0])
        if cu_seqlens_k is not cu_seqlens_q:
            checks.offsets_valid("masked_attention", "cu_seqlens_k", cu_seqlens_k, key.shape[0])


def _compose(
    query,
    key,
    value,
    query_ids,
    key_ids,
    cu_seqlens_q,
    cu_seqlens_k,
    table,
    grid,
    scale,
    return_lse,
):
    if table is not None:
        query, key = rotate(query, query_ids, table, grid), rotate(key, key_ids, table, grid)
    if cu_seqlens_q is None:
        return _attend(query, key, value, scale, return_lse)
    lengths_q = _lengths(cu_seqlens_q, query.shape[0])
    lengths_k = _lengths(cu_seqlens_k, key.shape[0])
    pieces = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    results = [
        _attend(q[None], k[None], v[None], scale, return_lse) for q, k, v in list(pieces)[:-1]
    ]
    # The rows past the last offset belong to no sequence.
    slack = query[query.shape[0] - lengths_q[-1] :]
    slack = slack.masked_fill(slack.new_ones((), dtype=torch.bool), 0.0)
    out = torch.cat([out[0] for out, _ in results] + [slack])
    if not return_lse:
        return out, None
    lse_slack = slack.new_full((query.shape[1], lengths_q[-1]), -torch.inf, dtype=torch.float32)
    return out, torch.cat([lse[0] for _, lse in results] + [lse_slack], dim=-1)


def _lengths(offsets: torch.Tensor, total: int) -> list[int]:
    ends = offsets.tolist()
    return [b - a for a, b in pairwise(ends)] + [total - ends[-1]]


def _attend(query, key, value, scale: float, return_lse: bool):
    """SDPA for ``[B, N, heads, head_dim]``; lse ``[B, heads, Nq]`` float32 where asked for."""
    if key.shape[1] == 0 or query.numel() == 0:
        lse = query.new_full(
            (query.shape[0], query.shape[2], query.shape[1]), -torch.inf, dtype=torch.float32
        )
        return query * 0, lse if return_lse else None
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    if not return_lse:
        return out.contiguous(), None
    with torch.no_grad():
        scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    return out.contiguous(), scores.logsumexp(-1)
