"""The specification of masked_attention in eager PyTorch: the formulas as written, O(N^2) memory,
ordinary autograd, any float dtype.

It shares nothing with the kernels: angles come from the formula rather than from the table, and
sequences are taken one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...backend import ANY_DEVICE, Backend, Reason
from ...rope3d import Rope3D, rope_dim
from .inputs import Inputs


def unsupported(inputs: Inputs) -> list[Reason]:
    return []


def compose(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse; shapes as in the public function."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if inputs.rope is not None:
        query = rotate(query, inputs.query_ids, inputs.rope)
        key = rotate(key, inputs.key_ids, inputs.rope)
    visible = _visible(inputs)
    if inputs.cu_seqlens_q is None:
        return _attend(query, key, value, inputs.scale, visible(slice(None), slice(None)))
    assert inputs.cu_seqlens_k is not None  # given with those of queries
    starts_q, starts_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    outs, lses = [], []
    for i in range(len(starts_q) - 1):
        rows_q, rows_k = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        seen = visible(rows_q, rows_k)
        out, lse = _attend(query[rows_q], key[rows_k], value[rows_k], inputs.scale, seen)
        outs.append(out)
        lses.append(lse)
    slack = query[starts_q[-1] :]
    outs.append(slack.masked_fill(slack.new_ones((), dtype=torch.bool), 0.0))
    lses.append(
        slack.new_full((query.shape[1], slack.shape[0]), -torch.inf, dtype=_lse_dtype(query))
    )
    return torch.cat(outs), torch.cat(lses, dim=-1)


def rotate(x: torch.Tensor, ids: torch.Tensor | None, rope: Rope3D) -> torch.Tensor:
    """R(x, ids) for ``[..., N, heads, head_dim]`` and ids ``[..., N]``: see `jepa_kernels.rope3d`
    for the formula."""
    assert ids is not None  # given with a rope
    m = rope_dim(x.shape[-1])
    _, height, width = rope.grid
    spatial = height * width
    axes = (ids // spatial, ids % spatial // width, ids % width)
    blocks = []
    for axis, position in enumerate(axes):
        position = position.to(torch.float64)
        if axis > 0 and rope.interpolate_from is not None:
            shift = 1 if rope.interpolation == "corners" else 0
            sides = rope.interpolate_from - shift, max(rope.grid[axis] - shift, 1)
            position = position * (sides[0] / sides[1])
        pair = torch.arange(m // 2, device=x.device, dtype=torch.float64)
        angle = position[..., None] * 10000.0 ** (-2.0 * pair / m)
        first, second = _pair_angles(angle, rope.layout)
        # A token without a position (id -1) keeps its channels: angle 0.
        first, second = (
            torch.where(ids[..., None] >= 0, a, 0.0)[..., None, :] for a in (first, second)
        )
        a, b = x[..., axis * m : (axis + 1) * m].unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack(
            (
                a * first.cos().to(x.dtype) - b * first.sin().to(x.dtype),
                b * second.cos().to(x.dtype) + a * second.sin().to(x.dtype),
            ),
            dim=-1,
        )
        blocks.append(rotated.flatten(-2))
    return torch.cat((*blocks, x[..., 3 * m :]), dim=-1)


def _pair_angles(angle: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The angle of each channel of pairs (2i, 2i + 1), from the m/2 angles of one axis."""
    if layout == "interleaved":
        return angle, angle
    per_channel = torch.cat((angle, angle), dim=-1)
    return per_channel[..., 0::2], per_channel[..., 1::2]


def _visible(inputs: Inputs) -> Callable[[slice, slice], torch.Tensor | None]:
    """(queries, keys) -> whether each of these queries sees each of these keys, ``[..., 1, Nq,
    Nk]``; None where there are no times."""
    query_times, key_times = inputs.query_times, inputs.key_times
    if query_times is None or key_times is None:
        return lambda queries, keys: None

    def visible(queries: slice, keys: slice) -> torch.Tensor:
        query_time = query_times[..., queries].long()[..., None, :, None]
        key_time = key_times[..., keys].long()[..., None, None, :]
        past = key_time <= query_time
        return past & (query_time - inputs.window < key_time) if inputs.window else past

    return visible


def _lse_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    visible: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v for ``[..., N, heads, head_dim]`` within one sequence, over the keys
    that are `visible`."""
    scores = torch.einsum("...qhd,...khd->...hqk", query, key) * scale
    if key.shape[-3] == 0:
        return query * 0, scores.new_full(scores.shape[:-1], -torch.inf, dtype=_lse_dtype(query))
    if visible is None:
        weights = scores.softmax(-1)
    else:
        # Queries that see nothing are set aside: a softmax over nothing would be NaN.
        sees = visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, -torch.inf)
        weights = scores.masked_fill(~sees, 0.0).softmax(-1).masked_fill(~visible, 0.0)
    out = torch.einsum("...hqk,...khd->...qhd", weights, value)
    return out, scores.detach().to(_lse_dtype(query)).logsumexp(-1)


BACKEND = Backend("reference", ANY_DEVICE, unsupported, compose=compose)
