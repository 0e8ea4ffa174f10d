"""The public function: checks, choice of backend, and the call."""

from __future__ import annotations

import torch

from ... import checks
from ...backend import resolve
from ...rope3d import Rope3D, rope_dim
from . import op as _op
from .call import Call

_NAME = "masked_attention"


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    rope: Rope3D | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the tokens that are there, with the rotary position of each token taken from
    its id.

    ``out = softmax(scale * R(query, query_ids) R(key, key_ids)^T) value`` within each sequence
    (Vaswani et al., arXiv 1706.03762, eq. 1; RoPE: Su et al., arXiv 2104.09864, over three axes as
    in V-JEPA 2, arXiv 2506.09985). R is described in `jepa_kernels.rope3d`.

    Args:
        query: ``[B, Nq, heads, head_dim]`` dense, or ``[tokens, heads, head_dim]`` packed. float32,
            bfloat16, float16 or float64. The channel stride must be 1; any other strides are read
            in place, so views of one qkv projection cost no copy. Differentiated.
        key, value: as `query`, with ``Nk`` (or their own number of) tokens, same heads, head_dim,
            dtype and device. Differentiated.
        query_ids, key_ids: int32 or int64 flat token ids ``t*H*W + y*W + x`` of ``rope.grid``:
            ``[B, N]`` or ``[N]`` (the same for every sequence) when dense, ``[tokens]`` when
            packed. -1 marks a token that is not rotated (class and register tokens). Required with
            `rope`, None without. ``key_ids=None`` uses `query_ids` (self-attention).
        rope: positions and layout, or None for attention without positions.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[sequences + 1]`` offsets of the packed
            sequences, starting at 0 and never decreasing; ``cu_seqlens_k=None`` uses
            `cu_seqlens_q`. None when dense. Rows past the last offset give output 0.
        scale: factor of the scores; None is ``head_dim ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Returns:
        out, shaped like `query` and contiguous; with `return_lse` also lse, float32 ``[B, heads,
        Nq]`` (packed: ``[heads, tokens]``), which is not differentiated. A sequence without keys
        gives out 0 and lse -inf; zero-length sequences give nothing.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        BackendUnsupportedError: the chosen backend cannot run this call; every reason is listed.

    Notes:
        Accumulates in float32 (float64 for float64). The cpu, triton and cuda backends are
        deterministic: bitwise equal for any thread count, packing order and process, forward and
        backward. Double backward, causal and dense masks are not supported. Under autocast float32
        inputs are cast to the autocast dtype, as for scaled_dot_product_attention.

    Example:
        >>> import torch
        >>> from jepa_kernels import Rope3D, masked_attention
        >>> qkv = torch.randn(2, 5, 3, 4, 32)  # 2 clips, 5 visible tokens, 4 heads
        >>> ids = torch.tensor([0, 3, 17, 40, 63])  # of a 4 x 4 x 4 grid
        >>> masked_attention(*qkv.unbind(2), query_ids=ids, rope=Rope3D((4, 4, 4))).shape
        torch.Size([2, 5, 4, 32])
    """
    query, key, value = _autocast(query, key, value)
    call = prepare(
        query,
        key,
        value,
        query_ids=query_ids,
        key_ids=key_ids,
        rope=rope,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        scale=scale,
        return_lse=return_lse,
    )
    name = resolve(_op.ROOM, call, backend)
    if rope is not None and key_ids is None:
        key_ids = query_ids
    if cu_seqlens_q is not None and cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    scale = call.head_dim**-0.5 if scale is None else float(scale)
    out, lse = _op.run(
        name,
        query,
        key,
        value,
        query_ids,
        key_ids,
        cu_seqlens_q,
        cu_seqlens_k,
        rope,
        scale,
        return_lse,
    )
    if not return_lse:
        return out
    assert lse is not None  # every backend returns it when asked
    return out, lse


def _autocast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What torch's autocast does to scaled_dot_product_attention: float inputs take the autocast
    dtype."""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        checks.is_tensor(_NAME, argument, tensor)
    kind = query.device.type
    # Devices without autocast, such as meta, refuse the question whether it is on.
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    query, key, value = (
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (query, key, value)
    )
    return query, key, value


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    rope: Rope3D | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Call:
    """Checks every argument (shapes, dtypes, devices; never values) and describes the call."""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        checks.is_tensor(_NAME, argument, tensor)
        checks.is_strided(_NAME, argument, tensor)
        checks.has_dtype(_NAME, argument, tensor, checks.FLOAT_DTYPES)
        checks.same_device(_NAME, argument, tensor, query.device)
        if tensor.dtype != query.dtype:
            raise ValueError(
                checks.sentence(
                    _NAME,
                    argument,
                    f"have the dtype of query ({checks.dtype_name(query.dtype)})",
                    checks.dtype_name(tensor.dtype),
                )
            )
    packed = cu_seqlens_q is not None
    if not packed and cu_seqlens_k is not None:
        raise ValueError(
            checks.sentence(_NAME, "cu_seqlens_k", "be None without cu_seqlens_q", "a tensor")
        )
    _check_rows(query, key, value, packed)
    if cu_seqlens_q is not None:
        _check_offsets("cu_seqlens_q", cu_seqlens_q, query)
        if cu_seqlens_k is not None:
            _check_offsets("cu_seqlens_k", cu_seqlens_k, query)
            if cu_seqlens_k.shape != cu_seqlens_q.shape:
                raise ValueError(
                    checks.sentence(
                        _NAME,
                        "cu_seqlens_k",
                        f"have the shape of cu_seqlens_q {tuple(cu_seqlens_q.shape)}",
                        tuple(cu_seqlens_k.shape),
                    )
                )
    _check_positions(query, key, query_ids, key_ids, rope, packed)
    if scale is not None:
        checks.is_finite_number(_NAME, "scale", scale)
    checks.is_bool(_NAME, "return_lse", return_lse)
    return Call(
        device_type=query.device.type,
        dtype=query.dtype,
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        packed=packed,
        grid=None if rope is None else rope.grid,
        layout=None if rope is None else rope.layout,
        needs_grad=torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad),
        return_lse=return_lse,
    )


def _check_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: bool) -> None:
    rank, meaning = (
        (3, "[tokens, heads, head_dim] with cu_seqlens_q")
        if packed
        else (4, "[B, N, heads, head_dim] without cu_seqlens_q")
    )
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        checks.has_rank(_NAME, argument, tensor, rank, meaning)
    if query.shape[-1] < 1 or query.shape[-2] < 1:
        raise ValueError(
            checks.sentence(
                _NAME,
                "query",
                "have at least one head and one channel",
                f"shape {tuple(query.shape)}",
            )
        )
    if key.shape[-2:] != query.shape[-2:] or (not packed and key.shape[0] != query.shape[0]):
        wanted = "[heads, head_dim]" if packed else "B, heads and head_dim"
        raise ValueError(
            checks.sentence(
                _NAME,
                "key",
                f"have the {wanted} of query {tuple(query.shape)}",
                f"shape {tuple(key.shape)}",
            )
        )
    if value.shape != key.shape:
        raise ValueError(
            checks.sentence(
                _NAME,
                "value",
                f"have the shape of key {tuple(key.shape)}",
                f"shape {tuple(value.shape)}",
            )
        )


def _check_offsets(argument: str, offsets: torch.Tensor, query: torch.Tensor) -> None:
    checks.is_tensor(_NAME, argument, offsets)
    checks.has_dtype(_NAME, argument, offsets, checks.ID_DTYPES)
    checks.has_rank(_NAME, argument, offsets, 1, "[sequences + 1]")
    checks.same_device(_NAME, argument, offsets, query.device)
    if offsets.shape[0] < 1:
        raise ValueError(checks.sentence(_NAME, argument, "have at least one offset", "none"))


def _check_positions(
    query: torch.Tensor,
    key: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    rope: Rope3D | None,
    packed: bool,
) -> None:
    if rope is None:
        for argument, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
            if ids is not None:
                raise ValueError(
                    checks.sentence(_NAME, argument, "be None without rope", checks.type_name(ids))
                )
        return
    if not isinstance(rope, Rope3D):
        raise TypeError(
            checks.sentence(_NAME, "rope", "be a Rope3D or None", checks.type_name(rope))
        )
    if query_ids is None:
        raise TypeError(checks.sentence(_NAME, "query_ids", "be given with rope", "None"))
    _check_ids("query_ids", query_ids, query, packed)
    if key_ids is not None:
        _check_ids("key_ids", key_ids, key, packed)
    elif key.shape[-3] != query.shape[-3]:
        raise ValueError(
            checks.sentence(
                _NAME,
                "key_ids",
                f"be given when key has other tokens ({key.shape[-3]}) than query "
                f"({query.shape[-3]})",
                "None",
            )
        )
    if rope_dim(query.shape[-1]) == 0:
        raise ValueError(
            checks.sentence(
                _NAME, "query", "have a head_dim of at least 6 with rope", query.shape[-1]
            )
        )


def _check_ids(argument: str, ids: torch.Tensor, rows: torch.Tensor, packed: bool) -> None:
    checks.is_tensor(_NAME, argument, ids)
    checks.has_dtype(_NAME, argument, ids, checks.ID_DTYPES)
    checks.same_device(_NAME, argument, ids, rows.device)
    shapes = [tuple(rows.shape[:1])] if packed else [tuple(rows.shape[:2]), tuple(rows.shape[1:2])]
    if tuple(ids.shape) not in shapes:
        raise ValueError(
            checks.sentence(
                _NAME, argument, f"have shape {' or '.join(map(str, shapes))}", tuple(ids.shape)
            )
        )
