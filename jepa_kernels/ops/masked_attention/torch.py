"""Fast eager composition: table rotation and scaled_dot_product_attention, one call per packed
sequence. Times become one call for each time where they are sorted, else a dense mask.

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
from ...contract import is_plain
from ...rope3d import rotate, rotate_transposed
from .inputs import Inputs

# Queries of a time below which a mask costs less than a call of their own.
_SHORTEST_RUN = 16


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
        assert inputs.query_ids is not None and inputs.key_ids is not None  # `check` saw them
        query = rotate(query, inputs.query_ids, inputs.rope_table, inputs.grid)
        key = rotate(key, inputs.key_ids, inputs.rope_table, inputs.grid)
    times = inputs.query_times, inputs.key_times
    if inputs.cu_seqlens_q is None:
        return _attend_in_time(query, key, value, *times, inputs)
    lengths_q = _lengths(inputs.cu_seqlens_q, query.shape[0])
    lengths_k = _lengths(inputs.cu_seqlens_k, key.shape[0])
    pieces = zip(
        query.split(lengths_q),
        key.split(lengths_k),
        value.split(lengths_k),
        *_split_times(times, lengths_q, lengths_k),
        strict=True,
    )
    results = [
        _attend_in_time(q[None], k[None], v[None], tq, tk, inputs)
        for q, k, v, tq, tk in list(pieces)[:-1]
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
        assert inputs.query_ids is not None and inputs.key_ids is not None  # `check` saw them
        query = rotate(query, inputs.query_ids, table, grid)
        key = rotate(key, inputs.key_ids, table, grid)
    delta = (grad_out.float() * out.float()).sum(-1).movedim(-1, -2)
    times = inputs.query_times, inputs.key_times
    if inputs.cu_seqlens_q is None:
        visible = _visible(*times, inputs.window)
        grads: Sequence[torch.Tensor] = _attend_backward(
            grad_out, query, key, value, delta, lse, scale, visible
        )
    else:
        lengths_q = _lengths(inputs.cu_seqlens_q, query.shape[0])
        lengths_k = _lengths(inputs.cu_seqlens_k, key.shape[0])
        by_query = [t.split(lengths_q) for t in (grad_out, query)] + [
            t.split(lengths_q, dim=-1) for t in (delta, lse)
        ]
        by_key = [t.split(lengths_k) for t in (key, value)]
        by_both = _split_times(times, lengths_q, lengths_k)
        pieces = [
            _attend_backward(g, q, k, v, d, m, scale, _visible(tq, tk, inputs.window))
            for g, q, d, m, k, v, tq, tk in list(zip(*by_query, *by_key, *by_both, strict=True))[
                :-1
            ]
        ]
        slack = [
            t.new_zeros((n, *t.shape[1:]))
            for t, n in ((query, lengths_q[-1]), (key, lengths_k[-1]), (value, lengths_k[-1]))
        ]
        parts = zip(*pieces, strict=True) if pieces else ((), (), ())
        grads = [torch.cat([*part, end]) for part, end in zip(parts, slack, strict=True)]
    grad_query, grad_key, grad_value = grads
    if table is not None:
        assert inputs.query_ids is not None and inputs.key_ids is not None  # `check` saw them
        grad_query = rotate_transposed(grad_query, inputs.query_ids, table, grid)
        grad_key = rotate_transposed(grad_key, inputs.key_ids, table, grid)
    return [g.contiguous() for g in (grad_query, grad_key, grad_value)]


def _attend_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    visible: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `_attend` for ``[..., N, heads, head_dim]``, with delta and lse ``[..., heads,
    Nq]`` and visible ``[..., 1, Nq, Nk]`` or None."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    grad_out, query, key, value = (
        t.to(wide).transpose(-3, -2) for t in (grad_out, query, key, value)
    )
    # A sequence without keys has lse -inf and no column to weigh, so no NaN can arise.
    weights = (query @ key.transpose(-1, -2) * scale - lse[..., None]).exp()
    if visible is not None:
        weights = weights.where(visible, 0.0)
    grad_scores = weights * (grad_out @ value.transpose(-1, -2) - delta[..., None]) * scale
    grads = (
        grad_scores @ key,
        grad_scores.transpose(-1, -2) @ query,
        weights.transpose(-1, -2) @ grad_out,
    )
    return tuple(g.transpose(-3, -2).to(dtype) for g in grads)


def _lengths(offsets: torch.Tensor | None, total: int) -> list[int]:
    assert offsets is not None  # those of keys are given with those of queries
    ends = offsets.tolist()
    return [b - a for a, b in pairwise(ends)] + [total - ends[-1]]


def _split_times(
    times: tuple[torch.Tensor | None, torch.Tensor | None],
    lengths_q: list[int],
    lengths_k: list[int],
) -> list[Sequence[torch.Tensor | None]]:
    """The times of each packed sequence, those of queries and those of keys."""
    query_times, key_times = times
    if query_times is None or key_times is None:
        return [[None] * len(lengths_q)] * 2
    return [query_times.split(lengths_q), key_times.split(lengths_k)]


def _visible(
    query_times: torch.Tensor | None, key_times: torch.Tensor | None, window: int
) -> torch.Tensor | None:
    """Whether each query sees each key, ``[..., 1, Nq, Nk]``; None without times."""
    if query_times is None or key_times is None:
        return None
    last = query_times.long()[..., None, :, None]
    time = key_times.long()[..., None, None, :]
    return (time <= last) & (time > last - window) if window else time <= last


def _attend_in_time(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_times: torch.Tensor | None,
    key_times: torch.Tensor | None,
    inputs: Inputs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`_attend` over the keys that each query sees: by slices of keys where times are sorted, else
    by a mask."""
    scale, return_lse = inputs.scale, inputs.return_lse
    runs = _runs(query_times, key_times, inputs.window)
    if runs is None:
        visible = _visible(query_times, key_times, inputs.window)
        return _attend(query, key, value, scale, return_lse, visible)
    parts = [
        _attend(query[:, queries], key[:, keys], value[:, keys], scale, return_lse)
        for queries, keys in runs
    ]
    out = torch.cat([out for out, _ in parts], dim=1)
    lses = [lse for _, lse in parts if lse is not None]
    return out, torch.cat(lses, dim=-1) if return_lse else None


def _runs(
    query_times: torch.Tensor | None, key_times: torch.Tensor | None, window: int
) -> list[tuple[slice, slice]] | None:
    """The queries of each time with the keys that they see, where one list of sorted times serves
    the batch, can be read without waiting, and gives calls that are worth their overhead."""
    if (
        query_times is None
        or key_times is None
        or query_times.device.type != "cpu"
        or query_times.dim() > 1
        or key_times.dim() > 1
        or not is_plain([query_times, key_times])
        or (query_times[1:] < query_times[:-1]).any()
        or (key_times[1:] < key_times[:-1]).any()
    ):
        return None
    times, counts = torch.unique_consecutive(query_times.long(), return_counts=True)
    if times.numel() * _SHORTEST_RUN > query_times.numel() or times.numel() == 0:
        return None
    known = key_times.long()
    ends = torch.searchsorted(known, times, right=True).tolist()
    starts = torch.searchsorted(known, times - window, right=True).tolist() if window else None
    bounds = [0, *counts.cumsum(0).tolist()]
    return [
        (slice(*queries), slice(starts[i] if starts else 0, ends[i]))
        for i, queries in enumerate(pairwise(bounds))
    ]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    return_lse: bool,
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SDPA for ``[B, N, heads, head_dim]`` over the keys that are visible; lse ``[B, heads, Nq]``
    float32 where asked for."""
    if key.shape[1] == 0 or query.numel() == 0:
        lse = query.new_full(
            (query.shape[0], query.shape[2], query.shape[1]), -torch.inf, dtype=torch.float32
        )
        return query * 0, lse if return_lse else None
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if visible is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        # Queries that see nothing are set aside: a softmax over nothing would be NaN.
        blind = ~visible.any(-1, keepdim=True)
        mask = (visible | blind).expand(q.shape[0], 1, q.shape[2], k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out = out.masked_fill(blind, 0.0)
    out = out.transpose(1, 2)
    if not return_lse:
        return out.contiguous(), None
    with torch.no_grad():
        scores = (q.float() @ k.float().transpose(-1, -2)) * scale
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
    return out.contiguous(), scores.logsumexp(-1)


BACKEND = Backend(
    "torch", ANY_DEVICE, unsupported, forward, backward, compose=compose, composes=composes
)
