"""float64 attention with rotation by table, written as directly as the definition reads; gradients
by autograd."""

from __future__ import annotations

import torch


def make_table(grid: tuple[int, int, int], rope_dim: int, layout: str) -> torch.Tensor:
    """[2, T + H + W, rope_dim] cosines and sines; the angle of channel c has frequency c // 2
    (interleaved) or c mod (m / 2) (tiled)."""
    channels = torch.arange(rope_dim)
    index = channels // 2 if layout == "interleaved" else channels % max(rope_dim // 2, 1)
    omega = 10000.0 ** (-index.double() / max(rope_dim / 2, 1))
    positions = torch.cat([torch.arange(n) for n in grid]).double()
    angles = positions[:, None] * omega[None]
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(
    x: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, grid: tuple[int, int, int]
) -> torch.Tensor:
    """x [N, heads, head_dim] by ids [N]."""
    t, h, w = grid
    m = table.shape[-1]
    ids = ids.long()
    known = ids.clamp(min=0)
    axes = torch.stack([known // (h * w), t + known // w % h, t + h + known % w])
    parts = []
    for axis in range(3):
        part = x[..., axis * m : (axis + 1) * m]
        cos, sin = table.double()[:, axes[axis]][:, :, None]
        perpendicular = torch.stack([-part[..., 1::2], part[..., 0::2]], -1).flatten(-2)
        parts.append(part * cos + perpendicular * sin)
    rotated = torch.cat([*parts, x[..., 3 * m :]], -1)
    return torch.where((ids >= 0)[:, None, None], rotated, x)


def seen(times_q: torch.Tensor, times_k: torch.Tensor, window: int) -> torch.Tensor:
    """[Nq, Nk] which query sees which key; a window of 0 is none."""
    age = times_q.long()[:, None] - times_k.long()[None, :]
    return (age >= 0) & (age < (window or 2**40))


def attend(
    q, k, v, scale, ids_q=None, ids_k=None, table=None, grid=(1, 1, 1), visible: torch.Tensor = None
):
    """One sequence: q [Nq, heads, head_dim] -> out, lse [heads, Nq]; a query that sees no key gives
    0 and -inf."""
    if table is not None:
        q, k = rotate(q, ids_q, table, grid), rotate(k, ids_k, table, grid)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if k.shape[0] == 0:
        return q * 0, torch.full(scores.shape[:2], float("-inf"), dtype=q.dtype)
    if visible is None:
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)
    # One query at a time over the keys that it sees.
    outs, lses = [q[:0]], [scores[:, :0, 0]]
    for i, keys in enumerate(visible):
        some = scores[:, i, keys]
        outs.append(torch.einsum("hk,khd->hd", some.softmax(-1), v[keys])[None])
        lses.append(some.logsumexp(-1)[:, None])
    return torch.cat(outs), torch.cat(lses, dim=1)


def oracle(call, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out, lse and the three gradients of a Call in float64; rows outside every sequence get 0 and
    -inf."""
    q, k, v = (t.detach().double().requires_grad_() for t in (call.q, call.k, call.v))
    packed = call.cu_q is not None
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(call.lse.shape, float("-inf"), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for s in range(call.cu_q.numel() - 1 if packed else q.shape[0]):
        at_q = slice(int(call.cu_q[s]), int(call.cu_q[s + 1])) if packed else slice(None)
        at_k = slice(int(call.cu_k[s]), int(call.cu_k[s + 1])) if packed else slice(None)
        pick = (lambda t, at: t[at]) if packed else (lambda t, at, s=s: t[s])
        *ids, times_q, times_k = [
            None if t is None else (t[at] if packed or t.dim() == 1 else t[s])
            for t, at in (
                (call.ids_q, at_q),
                (call.ids_k, at_k),
                (call.times_q, at_q),
                (call.times_k, at_k),
            )
        ]
        part, part_lse = attend(
            pick(q, at_q),
            pick(k, at_k),
            pick(v, at_k),
            call.scale,
            *ids,
            call.table,
            call.grid,
            None if times_q is None else seen(times_q, times_k, call.window),
        )
        pick(out, at_q)[...] = part.detach()
        (lse[:, at_q] if packed else lse[s])[...] = part_lse.detach()
        total = total + (part * pick(grad_out.double(), at_q)).sum()
    grads = (
        torch.autograd.grad(total, (q, k, v), allow_unused=True)
        if total.requires_grad
        else [None] * 3
    )
    return (
        out,
        lse,
        [torch.zeros_like(t) if g is None else g for g, t in zip(grads, (q, k, v), strict=True)],
    )
