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
    query_times: torch.Tensor | None = None,
    key_times: torch.Tensor | None = None,
    window: int | None = None,
    keys_rotated: bool = False,
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
    if keys_rotated is not False:
        key_ids = _unrotated_ids(key, key_ids, rope, keys_rotated)
    if query_times is not None:
        checks.is_tensor(NAME, "query_times", query_times)
        if key_times is None:
            key_times = _of_keys("key_times", query, key, query_times)
        checks.is_tensor(NAME, "key_times", key_times)
    if window is not None:
        _check_window(window, query_times)
    head_dim = query.shape[-1] if query.dim() else 0
    table = None
    if rope is not None:
        if key_ids is None:
            key_ids = _of_keys("key_ids", query, key, query_ids)
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
        query_times,
        key_times,
        0 if window is None else window,
        rope,
        return_lse,
    )
    check(inputs)
    return inputs.with_contiguous_channels()


def _of_keys(
    argument: str, query: torch.Tensor, key: torch.Tensor, of_queries: torch.Tensor | None
) -> torch.Tensor | None:
    """Self-attention: the keys are the queries' tokens."""
    if (
        of_queries is not None
        and query.dim() == key.dim() >= 3
        and key.shape[-3] != query.shape[-3]
    ):
        raise ValueError(
            checks.sentence(
                NAME,
                argument,
                f"be given when key has other tokens ({key.shape[-3]}) than query "
                f"({query.shape[-3]})",
                "None",
            )
        )
    return of_queries


def _unrotated_ids(
    key: torch.Tensor, key_ids: torch.Tensor | None, rope: Rope3D | None, keys_rotated: bool
) -> torch.Tensor | None:
    """Ids of keys that are to stay as they are."""
    checks.is_bool(NAME, "keys_rotated", keys_rotated)
    if rope is None:
        raise ValueError(checks.sentence(NAME, "keys_rotated", "be False without rope", True))
    if key_ids is not None:
        got = checks.type_name(key_ids)
        raise ValueError(checks.sentence(NAME, "key_ids", "be None with keys_rotated", got))
    if key.dim() < 3:
        return None  # `check` has a sentence for such a key
    return torch.full((1,), -1, device=key.device).expand(key.shape[-3])


def _check_window(window: int, query_times: torch.Tensor | None) -> None:
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(
            checks.sentence(NAME, "window", "be an int or None", checks.type_name(window))
        )
    if query_times is None:
        raise ValueError(checks.sentence(NAME, "window", "be None without query_times", window))
    if not 1 <= window < 2**32:
        raise ValueError(checks.sentence(NAME, "window", f"be from 1 to {2**32 - 1}", window))


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
