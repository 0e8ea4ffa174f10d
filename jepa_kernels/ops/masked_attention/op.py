"""The contract of masked_attention: one schema, one fake and one autograd formula for every kernel
backend.

The backend's name is an argument of the op and is saved for backward, so a new backend adds its
file and its name in PRIORITY.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import checks
from ...backend import Room
from ...rope3d import Rope3D, rope_dim
from .call import Call
from .preferences import PREFERENCES

PRIORITY = ("cuda", "triton", "cpu", "torch", "reference")

_NAME = "masked_attention"
_library = torch.library.Library("jepa_kernels", "FRAGMENT")
_library.define(
    "masked_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? query_ids, Tensor? "
    "key_ids, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? rope_table, SymInt[] grid, float scale, str backend) -> "
    "(Tensor, Tensor)"
)
_library.define(
    "masked_attention_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? "
    "query_ids, Tensor? key_ids, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? rope_table, Tensor out, Tensor lse, "
    "SymInt[] grid, float scale, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)

Tensors = tuple[torch.Tensor, ...]


def run(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    rope: Rope3D | None,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs a checked call on `backend`. `reference` and, outside a compiled graph, `torch` use
    their own autograd."""
    module = ROOM.modules[backend]
    if backend == "reference" or (backend == "torch" and module.traceable(cu_seqlens_q)):
        return module.compose(
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
    table = None if rope is None else rope.table(query.shape[-1], query.device)
    grid = [0, 0, 0] if rope is None else list(rope.grid)
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    out, lse = torch.ops.jepa_kernels.masked_attention_fwd(
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
        backend,
    )
    return out, lse


def lse_shape(query: torch.Tensor, packed: bool) -> list[int]:
    """[B, heads, Nq] dense, [heads, tokens] packed."""
    if packed:
        return [query.shape[1], query.shape[0]]
    return [query.shape[0], query.shape[2], query.shape[1]]


def _check_direct_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    rope_table: torch.Tensor | None,
    grid: Sequence[int],
    backend: str,
) -> None:
    """What the public function guarantees and a direct caller of torch.ops could get wrong, plus
    the checks of values."""
    from .api import prepare

    if backend not in ROOM.modules or backend == "reference":
        allowed = ", ".join(name for name in PRIORITY if name != "reference")
        raise ValueError(checks.sentence(_NAME, "backend", f"be one of {allowed}", repr(backend)))
    grid = tuple(grid)
    if len(grid) != 3:
        raise ValueError(checks.sentence(_NAME, "grid", "have three sizes (T, H, W)", grid))
    rope = None
    if rope_table is not None:
        rope = Rope3D(grid)
        checks.has_dtype(_NAME, "rope_table", rope_table, (torch.float32,))
        checks.same_device(_NAME, "rope_table", rope_table, query.device)
        wanted = (2, sum(grid), rope_dim(query.shape[-1] if query.dim() else 0))
        if tuple(rope_table.shape) != wanted or not rope_table.is_contiguous():
            raise ValueError(
                checks.sentence(
                    _NAME, "rope_table", f"be contiguous of shape {wanted}", tuple(rope_table.shape)
                )
            )
    call = prepare(
        query,
        key,
        value,
        query_ids=query_ids,
        key_ids=key_ids,
        rope=rope,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    for argument, given, other in (
        ("key_ids", key_ids, query_ids),
        ("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q),
    ):
        if given is None and other is not None:
            raise TypeError(checks.sentence(_NAME, argument, "be given in a direct call", "None"))
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(-1) != 1:
            raise ValueError(
                checks.sentence(_NAME, argument, "have channel stride 1", tensor.stride(-1))
            )
    reasons = ROOM.reasons(backend, call)
    if reasons:
        from ...backend import BackendUnsupportedError

        raise BackendUnsupportedError(
            f"{_NAME} cannot run on backend '{backend}': {'; '.join(reasons)}"
        )
    if rope is not None:
        checks.token_ids_in_grid(_NAME, "query_ids", query_ids, rope.num_tokens)
        if key_ids is not query_ids:
            checks.token_ids_in_grid(_NAME, "key_ids", key_ids, rope.num_tokens)
    if cu_seqlens_q is not None:
        checks.offsets_valid(_NAME, "cu_seqlens_q", cu_seqlens_q, query.shape[0])
        if cu_seqlens_k is not cu_seqlens_q:
            checks.offsets_valid(_NAME, "cu_seqlens_k", cu_seqlens_k, key.shape[0])


def _fwd(
    query,
    key,
    value,
    query_ids,
    key_ids,
    cu_seqlens_q,
    cu_seqlens_k,
    rope_table,
    grid,
    scale,
    backend,
) -> Tensors:
    _check_direct_call(
        query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, grid, backend
    )
    return ROOM.modules[backend].forward(
        query,
        key,
        value,
        query_ids,
        key_ids,
        cu_seqlens_q,
        cu_seqlens_k,
        rope_table,
        list(grid),
        scale,
    )


def _bwd(
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
    backend,
) -> Tensors:
    _check_direct_call(
        query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, grid, backend
    )
    for argument, tensor in (("grad_out", grad_out), ("out", out)):
        if (
            tensor.shape != query.shape
            or tensor.dtype != query.dtype
            or tensor.device != query.device
        ):
            raise ValueError(
                checks.sentence(
                    _NAME,
                    argument,
                    f"have the shape, dtype and device of query {tuple(query.shape)} "
                    f"{query.dtype} {query.device}",
                    f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}",
                )
            )
    wanted = lse_shape(query, cu_seqlens_q is not None)
    if (
        list(lse.shape) != wanted
        or lse.dtype != torch.float32
        or lse.device != query.device
        or not lse.is_contiguous()
    ):
        raise ValueError(
            checks.sentence(
                _NAME,
                "lse",
                f"be contiguous float32 of shape {wanted} on {query.device}",
                f"{tuple(lse.shape)} {lse.dtype}",
            )
        )
    # Gradients arrive expanded (a sum's) or transposed; kernels read rows of channels.
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    return ROOM.modules[backend].backward(
        grad_out,
        query,
        key,
        value,
        query_ids,
        key_ids,
        cu_seqlens_q,
        cu_seqlens_k,
        rope_table,
        out.contiguous(),
        lse,
        list(grid),
        scale,
    )


def _one_device(*tensors: torch.Tensor | None) -> None:
    """A call that mixes a meta tensor with real ones reaches only the fake, which must not answer
    it with unwritten memory."""
    for tensor in tensors[1:]:
        if tensor is not None:
            checks.same_device(_NAME, "every tensor", tensor, tensors[0].device)


def _fwd_fake(
    query,
    key,
    value,
    query_ids,
    key_ids,
    cu_seqlens_q,
    cu_seqlens_k,
    rope_table,
    grid,
    scale,
    backend,
) -> Tensors:
    _one_device(query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(lse_shape(query, cu_seqlens_q is not None), dtype=torch.float32)


def _bwd_fake(
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
    backend,
) -> Tensors:
    _one_device(
        query,
        grad_out,
        key,
        value,
        query_ids,
        key_ids,
        cu_seqlens_q,
        cu_seqlens_k,
        rope_table,
        out,
        lse,
    )
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
    )


def _setup_context(ctx, inputs, output) -> None:
    (
        query,
        key,
        value,
        query_ids,
        key_ids,
        cu_seqlens_q,
        cu_seqlens_k,
        rope_table,
        grid,
        scale,
        backend,
    ) = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(
        query, key, value, query_ids, key_ids, cu_seqlens_q, cu_seqlens_k, rope_table, out, lse
    )
    ctx.grid, ctx.scale, ctx.backend = grid, scale, backend


def _backward(ctx, grad_out, grad_lse):
    grads = torch.ops.jepa_kernels.masked_attention_bwd(
        grad_out, *ctx.saved_tensors, ctx.grid, ctx.scale, ctx.backend
    )
    return (*grads, *([None] * 8))


def _refuse_double_backward(ctx, *grads):
    raise NotImplementedError(
        f"{_NAME}: double backward must not be requested, got a gradient of a gradient. Use "
        "backend='reference'."
    )


_library.impl("masked_attention_fwd", _fwd, "CompositeExplicitAutograd")
_library.impl("masked_attention_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("jepa_kernels::masked_attention_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("jepa_kernels::masked_attention_bwd", _bwd_fake, lib=_library)
torch.library.register_autograd(
    "jepa_kernels::masked_attention_fwd", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "jepa_kernels::masked_attention_bwd", _refuse_double_backward, lib=_library
)


def _prepare(*args, **kwargs):
    from .api import prepare

    return prepare(*args, **kwargs)


def _example(device_type: str, dtype: torch.dtype) -> Call:
    shape = (2, 196, 3, 64)
    return Call(device_type, dtype, shape, shape, False, (1, 14, 14), "interleaved", True, False)


ROOM = Room(_NAME, PRIORITY, _prepare, _example, PREFERENCES)
