"""Fast eager composition: table rotation and scaled_dot_product_attention, one call per packed
sequence.

The baseline that kernels must beat, and what runs where no kernel does. Uses PyTorch's own
autograd; inside a compiled graph packed calls go through the op, because their loop reads lengths,
and backward then recomputes the composition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from ...backend import ANY_DEVICE, Backend, Reason
from .inputs import Inputs


def unsupported(inputs: Inputs) -> list[Reason]:
    return []


def composes(inputs: Inputs) -> bool:
    """True where `compose` may run in the caller's graph: always when dense, outside torch.compile
    when packed."""
    return not inputs.packed or not torch.compiler.is_compiling()


def compose(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out and lse (None unless asked for), with ordinary autograd."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if inputs.rope_table is not None:
        query = rotate(query, inputs.query_ids, inputs.rope_table, inputs.grid)
        key = rotate(key, inputs.key_ids, inputs.rope_table, inputs.grid)
    if inputs.cu_seqlens_q is None:
        return _attend(query, key, value, inputs.scale, inputs.return_lse)
    lengths_q = _lengths(inputs.cu_seqlens_q, query.shape[0])
    lengths_k = _lengths(inputs.cu_seqlens_k, key.shape[0])
    pieces = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    results = [
        _attend(q[None], k[None], v[None], inputs.scale, inputs.return_lse)
        for q, k, v in list(pieces)[:-1]
    ]
    # The rows past the last offset belong to no sequence.
    slack = query[query.shape[0] - lengths_q[-1] :]
    slack = slack.masked_fill(slack.new_ones((), dtype=torch.bool), 0.0)
    out = torch.cat([out[0] for out, _ in results] + [slack])
    if not inputs.return_lse:
        return out, None
    lse_slack = slack.new_full((query.shape[1], lengths_q[-1]), -torch.inf, dtype=torch.float32)
    lses = [lse[0] for _, lse in results if lse is not None]
    return out, torch.cat([*lses, lse_slack], dim=-1)


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = compose(replace(inputs, return_lse=True))
    assert lse is not None  # asked for
    return out.contiguous(), lse.contiguous()


def backward(
    inputs: Inputs, saved: list[torch.Tensor], grad_out: torch.Tensor, needs: list[bool]
) -> list[torch.Tensor]:
    """The softmax gradient written out: inside an op there is no autograd to ask. O(Nq * Nk) memory
    for one sequence at a time."""
    query, key, value, scale = inputs.query, inputs.key, inputs.value, inputs.scale
    out, lse = saved
    table, grid = inputs.rope_table, inputs.grid
    if table is not None:
        query = rotate(query, inputs.query_ids, table, grid)
        key = rotate(key, inputs.key_ids, table, grid)
    delta = (grad_out.float() * out.float()).sum(-1).movedim(-1, -2)
    if inputs.cu_seqlens_q is None:
        grads: Sequence[torch.Tensor] = _attend_backward(
            grad_out, query, key, value, delta, lse, scale
        )
    else:
        lengths_q = _lengths(inputs.cu_seqlens_q, query.shape[0])
        lengths_k = _lengths(inputs.cu_seqlens_k, key.shape[0])
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
        parts = zip(*pieces, strict=True) if pieces else ((), (), ())
        grads = [torch.cat([*part, end]) for part, end in zip(parts, slack, strict=True)]
    grad_query, grad_key, grad_value = grads
    if table is not None:
        grad_query = _rotate_transposed(grad_query, inputs.query_ids, table, grid)
        grad_key = _rotate_transposed(grad_key, inputs.key_ids, table, grid)
    return [g.contiguous() for g in (grad_query, grad_key, grad_value)]


def _attend_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
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
    x: torch.Tensor, ids: torch.Tensor | None, table: torch.Tensor, grid: list[int]
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
    grad: torch.Tensor, ids: torch.Tensor | None, table: torch.Tensor, grid: list[int]
) -> torch.Tensor:
    """The gradient of `rotate`: the transpose, which is the inverse only for the interleaved
    layout."""
    cos, sin = _angles(ids, table, grid, grad.dtype)
    head, tail = grad.tensor_split((cos.shape[-1],), dim=-1)
    even, odd = (head * sin).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((head * cos + torch.stack((odd, -even), dim=-1).flatten(-2), tail), dim=-1)


def _angles(
    ids: torch.Tensor | None, table: torch.Tensor, grid: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every rotated channel of every token, ``[..., N, 1, 3 m]``; 1 and 0 where
    the id is -1."""
    assert ids is not None  # given with a table
    frames, height, width = grid
    spatial = height * width
    place = ids.clamp(min=0).long()
    rows = (place // spatial, frames + place % spatial // width, frames + height + place % width)
    cos, sin = torch.cat([table[:, row] for row in rows], dim=-1).to(dtype)
    unrotated = (ids < 0)[..., None]
    return cos.masked_fill(unrotated, 1.0)[..., None, :], sin.masked_fill(unrotated, 0.0)[
        ..., None, :
    ]


def _lengths(offsets: torch.Tensor | None, total: int) -> list[int]:
    assert offsets is not None  # those of keys are given with those of queries
    ends = offsets.tolist()
    return [b - a for a, b in pairwise(ends)] + [total - ends[-1]]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
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


BACKEND = Backend(
    "torch", ANY_DEVICE, unsupported, forward, backward, compose=compose, composes=composes
)
