"""The inputs of one masked_attention call: what they must satisfy, and what backends read of
them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ... import checks
from ...backend import Reason, dtype_reasons
from ...checks import dtype_name
from ...contract import beside_the_schema, call_inputs, differentiable
from ...rope3d import Rope3D, rope_dim

NAME = "masked_attention"


@call_inputs(slots=True)
class Inputs:
    """One call. Shapes as in the public function; ids, times and offsets of keys are always given
    where those of queries are. A window of 0 is none."""

    query: torch.Tensor = differentiable()
    key: torch.Tensor = differentiable()
    value: torch.Tensor = differentiable()
    query_ids: torch.Tensor | None
    key_ids: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    rope_table: torch.Tensor | None
    grid: list[int]
    scale: float
    query_times: torch.Tensor | None = None
    key_times: torch.Tensor | None = None
    window: int = 0
    rope: Rope3D | None = beside_the_schema(default=None)
    return_lse: bool = beside_the_schema(default=True)

    @property
    def device_type(self) -> str:
        return self.query.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def heads(self) -> int:
        return self.query.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[-1]

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Every tensor but the times, in the order of the native ops."""
        return (
            self.query,
            self.key,
            self.value,
            self.query_ids,
            self.key_ids,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.rope_table,
        )

    def lse_shape(self) -> list[int]:
        """[B, heads, Nq] dense, [heads, tokens] packed."""
        shape = self.query.shape
        return [shape[1], shape[0]] if self.packed else [shape[0], shape[2], shape[1]]

    def size_class(self) -> str:
        """``tiny`` up to 64 keys a sequence (dense) or in all (packed), ``short`` up to 512, else
        ``long``."""
        keys = self.key.shape[-3]
        return "tiny" if keys <= 64 else "short" if keys <= 512 else "long"

    def describe(self) -> str:
        parts = [
            f"query {list(self.query.shape)} {dtype_name(self.dtype)} {self.device_type}; "
            f"key {list(self.key.shape)}",
            "packed" if self.packed else "dense",
            "no RoPE"
            if self.rope_table is None
            else f"grid {tuple(self.grid)}" + (f" {self.rope.layout}" if self.rope else ""),
        ]
        if self.query_times is not None:
            parts.append("times" + (f", window {self.window}" if self.window else ""))
        if torch.is_grad_enabled() and any(
            t.requires_grad for t in (self.query, self.key, self.value)
        ):
            parts.append("gradients needed")
        return "; ".join(parts)

    def with_contiguous_channels(self) -> Inputs:
        """The same call with channel stride 1, which kernels read."""
        if self.query.stride(-1) == self.key.stride(-1) == self.value.stride(-1) == 1:
            return self
        query, key, value = (
            t if t.stride(-1) == 1 else t.contiguous() for t in (self.query, self.key, self.value)
        )
        return replace(self, query=query, key=key, value=value)


def outputs(inputs: Inputs, backend: Any = None) -> list[tuple[list[int], torch.dtype]]:
    """out and lse."""
    return [(list(inputs.query.shape), inputs.dtype), (inputs.lse_shape(), torch.float32)]


def check(inputs: Inputs) -> None:
    """Raises a sentence unless shapes, dtypes and devices are those of a masked_attention call."""
    if not _is_sound(inputs):
        _refuse(inputs)


def _is_sound(inputs: Inputs) -> bool:
    """True only for sound inputs, at the cost of a few comparisons: this runs at every call."""
    query, key, value = inputs.query, inputs.key, inputs.value
    shape, shape_k, device, dtype = query.shape, key.shape, query.device, query.dtype
    packed = inputs.cu_seqlens_q is not None
    rank = 3 if packed else 4
    if not (
        len(shape) == rank
        and len(shape_k) == rank
        and value.shape == shape_k
        and shape[-2:] == shape_k[-2:]
        and (packed or shape[0] == shape_k[0])
        and dtype in checks.FLOAT_DTYPES
        and key.dtype == value.dtype == dtype
        and key.device == device
        and value.device == device
        and query.layout == key.layout == value.layout == torch.strided
        and shape[-1] >= 1
        and shape[-2] >= 1
    ):
        return False
    if packed or inputs.cu_seqlens_k is not None:
        return False
    times, times_k = inputs.query_times, inputs.key_times
    if times is None:
        if times_k is not None or inputs.window != 0:
            return False
    elif not (
        times_k is not None
        and times.dtype in checks.ID_DTYPES
        and times_k.dtype in checks.ID_DTYPES
        and times.device == device
        and times_k.device == device
        and (times.shape == shape[1:2] or times.shape == shape[:2])
        and (times_k.shape == shape_k[1:2] or times_k.shape == shape_k[:2])
        and 0 <= inputs.window < 2**32
    ):
        return False
    ids, ids_k = inputs.query_ids, inputs.key_ids
    if inputs.rope_table is None:
        return ids is None and ids_k is None
    if ids is None or ids_k is None or shape[-1] < 6:
        return False
    return (
        ids.dtype in checks.ID_DTYPES
        and ids_k.dtype in checks.ID_DTYPES
        and ids.device == device
        and ids_k.device == device
        and (ids.shape == shape[1:2] or ids.shape == shape[:2])
        and (ids_k.shape == shape_k[1:2] or ids_k.shape == shape_k[:2])
    )


def _fail(argument: str, requirement: str, got: object) -> None:
    raise ValueError(checks.sentence(NAME, argument, requirement, got))


def _refuse(inputs: Inputs) -> None:
    """The checks one by one, each with its sentence."""
    query = inputs.query
    for argument, tensor in (("query", query), ("key", inputs.key), ("value", inputs.value)):
        checks.is_strided(NAME, argument, tensor)
        checks.has_dtype(NAME, argument, tensor, checks.FLOAT_DTYPES)
        checks.same_device(NAME, argument, tensor, query.device)
        if tensor.dtype != query.dtype:
            wanted = f"have the dtype of query ({dtype_name(query.dtype)})"
            _fail(argument, wanted, dtype_name(tensor.dtype))
    if not inputs.packed and inputs.cu_seqlens_k is not None:
        _fail("cu_seqlens_k", "be None without cu_seqlens_q", "a tensor")
    _check_rows(inputs)
    _check_offsets(inputs)
    _check_positions(inputs)
    _check_times(inputs)


def _check_rows(inputs: Inputs) -> None:
    query, key, value, packed = inputs.query, inputs.key, inputs.value, inputs.packed
    rank, meaning = (
        (3, "[tokens, heads, head_dim] with cu_seqlens_q")
        if packed
        else (4, "[B, N, heads, head_dim] without cu_seqlens_q")
    )
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        checks.has_rank(NAME, argument, tensor, rank, meaning)
    if query.shape[-1] < 1 or query.shape[-2] < 1:
        wanted = "have at least one head and one channel"
        _fail("query", wanted, f"shape {tuple(query.shape)}")
    if key.shape[-2:] != query.shape[-2:] or (not packed and key.shape[0] != query.shape[0]):
        wanted = "[heads, head_dim]" if packed else "B, heads and head_dim"
        wanted = f"have the {wanted} of query {tuple(query.shape)}"
        _fail("key", wanted, f"shape {tuple(key.shape)}")
    if value.shape != key.shape:
        _fail("value", f"have the shape of key {tuple(key.shape)}", f"shape {tuple(value.shape)}")


def _check_offsets(inputs: Inputs) -> None:
    first = inputs.cu_seqlens_q
    if first is None:
        return
    for argument, offsets in (("cu_seqlens_q", first), ("cu_seqlens_k", inputs.cu_seqlens_k)):
        if offsets is None:
            raise TypeError(checks.sentence(NAME, argument, "be given in a direct call", "None"))
        checks.is_tensor(NAME, argument, offsets)
        checks.has_dtype(NAME, argument, offsets, checks.ID_DTYPES)
        checks.has_rank(NAME, argument, offsets, 1, "[sequences + 1]")
        checks.same_device(NAME, argument, offsets, inputs.query.device)
        if offsets.shape[0] < 1:
            _fail(argument, "have at least one offset", "none")
        if offsets.shape != first.shape:
            wanted = f"have the shape of cu_seqlens_q {tuple(first.shape)}"
            _fail(argument, wanted, tuple(offsets.shape))


def _check_positions(inputs: Inputs) -> None:
    given = (
        ("query_ids", inputs.query_ids, inputs.query),
        ("key_ids", inputs.key_ids, inputs.key),
    )
    for argument, ids, rows in given:
        if inputs.rope_table is None:
            if ids is not None:
                _fail(argument, "be None without rope", checks.type_name(ids))
            continue
        if ids is None:
            raise TypeError(checks.sentence(NAME, argument, "be given with rope", "None"))
        _check_per_token(argument, ids, rows, inputs.packed)
    if inputs.rope_table is not None and rope_dim(inputs.head_dim) == 0:
        _fail("query", "have a head_dim of at least 6 with rope", inputs.head_dim)


def _check_times(inputs: Inputs) -> None:
    if inputs.query_times is None:
        if inputs.key_times is not None:
            got = checks.type_name(inputs.key_times)
            _fail("key_times", "be None without query_times", got)
        if inputs.window != 0:
            _fail("window", "be 0 (none) without query_times", inputs.window)
        return
    _check_per_token("query_times", inputs.query_times, inputs.query, inputs.packed)
    if inputs.key_times is None:
        raise TypeError(checks.sentence(NAME, "key_times", "be given in a direct call", "None"))
    _check_per_token("key_times", inputs.key_times, inputs.key, inputs.packed)
    if not 0 <= inputs.window < 2**32:
        _fail("window", f"be from 0 (none) to {2**32 - 1}", inputs.window)


def _check_per_token(
    argument: str, numbers: torch.Tensor, rows: torch.Tensor, packed: bool
) -> None:
    """Ids or times: one of each token."""
    checks.is_tensor(NAME, argument, numbers)
    checks.has_dtype(NAME, argument, numbers, checks.ID_DTYPES)
    checks.same_device(NAME, argument, numbers, rows.device)
    shapes = [tuple(rows.shape[:1])]
    if not packed:
        shapes = [tuple(rows.shape[:2]), tuple(rows.shape[1:2])]
    if tuple(numbers.shape) not in shapes:
        _fail(argument, f"have shape {' or '.join(map(str, shapes))}", tuple(numbers.shape))


def check_direct(inputs: Inputs) -> None:
    """What the public function guarantees and a direct caller of torch.ops could get wrong."""
    grid = tuple(inputs.grid)
    if len(grid) != 3:
        _fail("grid", "have three sizes (T, H, W)", grid)
    table, query = inputs.rope_table, inputs.query
    if table is not None:
        Rope3D((grid[0], grid[1], grid[2]))
        checks.has_dtype(NAME, "rope_table", table, (torch.float32,))
        checks.same_device(NAME, "rope_table", table, query.device)
        wanted = (2, sum(grid), rope_dim(query.shape[-1] if query.dim() else 0))
        if tuple(table.shape) != wanted or not table.is_contiguous():
            _fail("rope_table", f"be contiguous of shape {wanted}", tuple(table.shape))
    for argument in ("query", "key", "value"):
        tensor = getattr(inputs, argument)
        if tensor.dim() and tensor.stride(-1) != 1:
            _fail(argument, "have channel stride 1", tensor.stride(-1))


def check_values(inputs: Inputs) -> None:
    """Ids lie in the grid, offsets in the rows and times in 32 bits; read on a CPU, on a GPU only
    where asked for."""
    if inputs.rope_table is not None:
        assert inputs.query_ids is not None and inputs.key_ids is not None  # `check` saw them
        frames, height, width = inputs.grid
        total = frames * height * width
        checks.token_ids_in_grid(NAME, "query_ids", inputs.query_ids, total)
        if inputs.key_ids is not inputs.query_ids:
            checks.token_ids_in_grid(NAME, "key_ids", inputs.key_ids, total)
    if inputs.cu_seqlens_q is not None:
        assert inputs.cu_seqlens_k is not None  # `check` saw them
        checks.offsets_valid(NAME, "cu_seqlens_q", inputs.cu_seqlens_q, inputs.query.shape[0])
        if inputs.cu_seqlens_k is not inputs.cu_seqlens_q:
            checks.offsets_valid(NAME, "cu_seqlens_k", inputs.cu_seqlens_k, inputs.key.shape[0])
    if inputs.query_times is not None:
        assert inputs.key_times is not None  # `check` saw them
        checks.times_in_range(NAME, "query_times", inputs.query_times)
        if inputs.key_times is not inputs.query_times:
            checks.times_in_range(NAME, "key_times", inputs.key_times)


def shape_reasons(inputs: Inputs, dtypes: tuple[torch.dtype, ...]) -> list[Reason]:
    """The dtypes and head widths that kernel backends take."""
    head_dim, dtype = inputs.query.shape[-1], inputs.query.dtype
    reasons = [] if dtype in dtypes else dtype_reasons((dtype,), dtypes)
    if head_dim % 8 or not 8 <= head_dim <= 128:
        reasons.append(Reason(f"head_dim must be a multiple of 8 from 8 to 128, got {head_dim}"))
    return reasons


def times_reasons(inputs: Inputs) -> list[Reason]:
    """Why a backend whose kernels do not read times cannot run a call with them."""
    if inputs.query_times is None:
        return []
    return [Reason("query_times must be None (this backend does not read times yet), got a tensor")]


def rows_of_channels(grad_out: torch.Tensor) -> torch.Tensor:
    """Gradients arrive expanded (a sum's) or transposed; kernels read rows of channels."""
    return grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()


def example(tokens: int, batch: int = 2, heads: int = 3, head_dim: int = 64) -> Any:
    """Inputs of an ordinary call with `tokens` tokens a sequence, by device type and dtype."""

    def build(device_type: str, dtype: torch.dtype) -> Inputs:
        rows = torch.empty(batch, tokens, heads, head_dim, device=device_type, dtype=dtype)
        rope = Rope3D((1, 1, tokens))
        ids = torch.arange(tokens, device=device_type)
        # Zeros serve here: the device may be one that is only pretended, and computes nothing.
        table = torch.zeros(2, sum(rope.grid), rope_dim(head_dim), device=device_type)
        query, key, value = (torch.zeros_like(rows) for _ in range(3))
        return Inputs(
            query, key, value, ids, ids, None, None, table, list(rope.grid), 0.125, rope=rope
        )

    return build
