"""The contract of masked_attention: its backends in the order `auto` tries them, its schema, its
checks."""

from __future__ import annotations

import torch

from ... import checks
from ...contract import Function
from ...rope3d import Rope3D
from .inputs import NAME, Inputs, check, check_direct, check_values, example, outputs

PRIORITY = ("cuda", "triton", "flash", "cpu", "torch", "reference")


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
) -> Inputs:
    """The checked inputs of the public function's arguments (values are not read)."""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            checks.is_tensor(NAME, argument, tensor)
    if rope is not None and not isinstance(rope, Rope3D):
        raise TypeError(
            checks.sentence(NAME, "rope", "be a Rope3D or None", checks.type_name(rope))
        )
    if scale is not None:
        checks.is_finite_number(NAME, "scale", scale)
    if return_lse is not False:
        checks.is_bool(NAME, "return_lse", return_lse)
    head_dim = query.shape[-1] if query.dim() else 0
    table = None
    if rope is not None:
        if key_ids is None:
            key_ids = _ids_of_keys(query, key, query_ids)
        table = rope.table(head_dim, query.device)
    inputs = Inputs(
        query,
        key,
        value,
        query_ids,
        key_ids,
        cu_seqlens_q,
        cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
        table,
        [0, 0, 0] if rope is None else list(rope.grid),
        float(head_dim) ** -0.5 if scale is None and head_dim else float(scale or 0.0),
        rope,
        return_lse,
    )
    check(inputs)
    return inputs.with_contiguous_channels()


def _ids_of_keys(
    query: torch.Tensor, key: torch.Tensor, query_ids: torch.Tensor | None
) -> torch.Tensor | None:
    """Self-attention: the keys are the queries' tokens."""
    if query_ids is not None and query.dim() == key.dim() >= 3 and key.shape[-3] != query.shape[-3]:
        raise ValueError(
            checks.sentence(
                NAME,
                "key_ids",
                f"be given when key has other tokens ({key.shape[-3]}) than query "
                f"({query.shape[-3]})",
                "None",
            )
        )
    return query_ids


OP = Function(
    NAME,
    __package__,
    PRIORITY,
    prepare,
    {"short": example(196), "tiny": example(16), "long": example(1568)},
    inputs=Inputs,
    check=check,
    check_direct=check_direct,
    check_values=check_values,
    outputs=outputs,
    num_outputs=2,
    saved=(0, 1),
)
