"""Fast eager composition: table rotation and scaled_dot_product_attention, one call per packed sequence.

The baseline that kernels must beat, and what runs where no kernel does. Uses PyTorch's own autograd; inside a compiled graph packed
calls go through the op, because their loop reads lengths, and backward then recomputes the composition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import checks
from ...rope3d import Rope3D
from .call import Call


def unsupported_reasons(call: Call) -> list[str]:
    return []


def traceable(cu_seqlens_q: torch.Tensor | None) -> bool:
    """True where `compose` may run in the caller's graph: always when dense, outside torch.compile when packed."""
    return cu_seqlens_q is None or not torch.compiler.is_compiling()


def compose(query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope: Rope3D | None, scale: float, return_lse: bool):
    """out and lse (None unless asked for) of a checked call, with ordinary autograd."""
    table = None if rope is None else rope.table(query.shape[-1], query.device)
    grid = (0, 0, 0) if rope is None else rope.grid
    if not torch.compiler.is_compiling():
        _check_values(query, key, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope)
    return _compose(query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, table, grid, scale, return_lse)


def forward(query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, grid, scale):
    out, lse = _compose(query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, tuple(grid), scale, True)
    return out.contiguous(), lse.contiguous()


def backward(grad_out, query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, out, lse, grid, scale):
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (query, key, value)]
        again, _ = _compose(*inputs, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, tuple(grid), scale, False)
        grads = torch.autograd.grad(again, inputs, grad_out, allow_unused=True, materialize_grads=True)
    return tuple(g.contiguous() for g in grads)


def rotate(x: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """R(x, ids) by the table of `Rope3D.table`, for ``[..., N, heads, head_dim]`` and ids ``[..., N]``."""
    frames, height, width = grid
    m = table.shape[-1]
    spatial = height * width
    place = ids.clamp(min=0).long()
    rows = (place // spatial, frames + place % spatial // width, frames + height + place % width)
    cos, sin = torch.cat([table[:, row] for row in rows], dim=-1).to(x.dtype)
    unrotated = (ids < 0)[..., None]
    cos, sin = cos.masked_fill(unrotated, 1.0)[..., None, :], sin.masked_fill(unrotated, 0.0)[..., None, :]
    head, tail = x[..., : 3 * m], x[..., 3 * m :]
    even, odd = head.unflatten(-1, (-1, 2)).unbind(-1)
    partner = torch.stack((-odd, even), dim=-1).flatten(-2)
    return torch.cat((head * cos + partner * sin, tail), dim=-1)


def _check_values(query, key, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope: Rope3D | None) -> None:
    if rope is not None:
        checks.token_ids_in_grid("masked_attention", "query_ids", query_ids, rope.num_tokens)
        if key_ids is not query_ids:
            checks.token_ids_in_grid("masked_attention", "key_ids", key_ids, rope.num_tokens)
    if cu_seqlens_q is not None:
        checks.offsets_valid("masked_attention", "cu_seqlens_q", cu_seqlens_q, query.shape[0])
        if cu_seqlens_k is not cu_seqlens_q:
            checks.offsets_valid("masked_attention", "cu_seqlens_k", cu_seqlens_k, key.shape[0])


def _compose(query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, table, grid, scale, return_lse):
    if table is not None:
        query, key = rotate(query, query_ids, table, grid), rotate(key, key_ids, table, grid)
    if cu_seqlens_q is None:
        return _attend(query, key, value, scale, return_lse)
    lengths_q = _lengths(cu_seqlens_q, query.shape[0])
    lengths_k = _lengths(cu_seqlens_k, key.shape[0])
    pieces = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    results = [_attend(q[None], k[None], v[None], scale, return_lse) for q, k, v in list(pieces)[:-1]]
    # The rows past the last offset belong to no sequence.
    slack = query.new_zeros((lengths_q[-1], *query.shape[1:]))
    out = torch.cat([out[0] for out, _ in results] + [slack])
    if not return_lse:
        return out, None
    lse_slack = slack.new_full((query.shape[1], lengths_q[-1]), -torch.inf, dtype=torch.float32)
    return out, torch.cat([lse[0] for _, lse in results] + [lse_slack], dim=-1)


def _lengths(offsets: torch.Tensor, total: int) -> list[int]:
    ends = offsets.tolist()
    return [b - a for a, b in zip(ends, ends[1:], strict=False)] + [total - ends[-1]]


def _attend(query, key, value, scale: float, return_lse: bool):
    """SDPA for ``[B, N, heads, head_dim]``; lse ``[B, heads, Nq]`` float32 where asked for."""
    if key.shape[1] == 0 or query.numel() == 0:
        lse = query.new_full((query.shape[0], query.shape[2], query.shape[1]), -torch.inf, dtype=torch.float32)
        return query * 0, lse if return_lse else None
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    if not return_lse:
        return out.contiguous(), None
    with torch.no_grad():
        scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    return out.contiguous(), scores.logsumexp(-1)
