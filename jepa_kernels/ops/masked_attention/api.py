"""The public function of masked_attention."""

from __future__ import annotations

from typing import Literal, overload

import torch

from ... import checks
from ...backend import resolve
from ...rope3d import Rope3D
from .contract import OP, prepare
from .inputs import NAME


@overload
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
    query_times: torch.Tensor | None = None,
    key_times: torch.Tensor | None = None,
    window: int | None = None,
    keys_rotated: bool = False,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
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
    query_times: torch.Tensor | None = None,
    key_times: torch.Tensor | None = None,
    window: int | None = None,
    keys_rotated: bool = False,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
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
    query_times: torch.Tensor | None = None,
    key_times: torch.Tensor | None = None,
    window: int | None = None,
    keys_rotated: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over token ids, dense or packed: each token's rotary position is read from its id,
    and who sees whom from its time.

    ``out = softmax(scale * R(query, query_ids) R(key, key_ids)^T) value`` within each sequence
    (Vaswani et al., arXiv 1706.03762, eq. 1; RoPE: Su et al., arXiv 2104.09864, over three axes as
    in V-JEPA 2, arXiv 2506.09985). R is described in `jepa_kernels.rope3d`.

    With times a query sees a key iff ``query_time - window < key_time <= query_time``; softmax runs
    over the keys that it sees. Frames as times give the block-causal mask of V-JEPA 2-AC (arXiv
    2506.09985, section 3.1); `jepa_kernels.times` makes times for the usual masks.

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
        query_times, key_times: int32 or int64 times from -2**31 to 2**31 - 1, shaped like ids and
            in any order, or None: every query then sees every key of its sequence.
            ``key_times=None`` uses `query_times` (self-attention).
        window: how many times back a query sees, at least 1 (its own time alone), or None for all
            of the past. Only with `query_times`.
        keys_rotated: the keys have been rotated already, as those of a
            `jepa_kernels.nn.KeyValueCache` or of `Rope3D.rotate`: `rope` rotates the queries alone,
            and `key_ids` must be None.
        scale: factor of the scores; None is ``head_dim ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Returns:
        out, shaped like `query` and contiguous; with `return_lse` also lse, float32 ``[B, heads,
        Nq]`` (packed: ``[heads, tokens]``), which is not differentiated. A query that sees no key
        gives out 0, lse -inf and gradient 0; zero-length sequences give nothing.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        BackendUnsupportedError: the chosen backend cannot run this call; every reason is listed.

    Notes:
        Accumulates in float32 (float64 for float64). The cpu, triton and cuda backends are
        deterministic: bitwise equal for any thread count, packing order and process, forward and
        backward; flash repeats its gradients under torch.use_deterministic_algorithms. Kernels skip
        tiles of keys and queries whose times cannot meet, so sorted tokens cost least. Double
        backward and dense masks are not supported. Under autocast float32 inputs are cast to the
        autocast dtype, as for scaled_dot_product_attention.

    Example:
        >>> import torch
        >>> from jepa_kernels import Rope3D, masked_attention
        >>> qkv = torch.randn(2, 5, 3, 4, 32)  # 2 clips, 5 visible tokens, 4 heads
        >>> ids = torch.tensor([0, 3, 17, 40, 63])  # of a 4 x 4 x 4 grid
        >>> masked_attention(*qkv.unbind(2), query_ids=ids, rope=Rope3D((4, 4, 4))).shape
        torch.Size([2, 5, 4, 32])
    """
    checks.is_tensor(NAME, "query", query)
    query, key, value = checks.under_autocast(query.device.type, query, key, value)
    inputs = prepare(
        query,
        key,
        value,
        query_ids=query_ids,
        key_ids=key_ids,
        rope=rope,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        query_times=query_times,
        key_times=key_times,
        window=window,
        keys_rotated=keys_rotated,
        scale=scale,
        return_lse=return_lse,
    )
    out, lse = OP.run(inputs, resolve(OP, inputs, backend))
    return (out, lse) if return_lse else out
