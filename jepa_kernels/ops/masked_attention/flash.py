"""Flash backend: attention kernels that others keep, between our rotation and its transpose.

A kernel of ours turns queries and keys, FlashAttention 3 or 4 or the one inside torch attends, and
another turns the gradients back. The first library of `LIBRARIES` that fits this machine runs.

Packed calls read their offsets, because the libraries are told the longest sequence: once for each
offsets tensor, whose first call therefore waits for the device. While a CUDA graph records, nothing
is read and the number of rows stands for the longest sequence. Under
``torch.use_deterministic_algorithms`` every library repeats bit for bit; otherwise the order in
which they add up the gradient of the queries may vary.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ... import capability, checks, triton_runtime
from ...backend import Backend, Reason
from ...rope3d import rope_dim
from .inputs import NAME, Inputs, shape_reasons, times_reasons
from .triton_launch import alignment, id_strides, launch_options, panel_strides
from .triton_table import ROTATE_HEADS, ROTATE_TILE, channels

_DTYPES = (torch.bfloat16, torch.float16)
Grads = tuple[torch.Tensor, ...]  # of query, key and value


@dataclass(frozen=True)
class Packed:
    """The sequences of a packed call: int32 offsets, the most rows of one, and the row where the
    last ends (None while a graph records)."""

    offsets_q: torch.Tensor
    offsets_k: torch.Tensor
    longest_q: int
    longest_k: int
    end_q: int | None
    end_k: int | None

    def named(self) -> dict[str, Any]:
        """As FlashAttention 3 and 4 call them."""
        return {
            "cu_seqlens_q": self.offsets_q,
            "cu_seqlens_k": self.offsets_k,
            "max_seqlen_q": self.longest_q,
            "max_seqlen_k": self.longest_k,
        }


_OFFSETS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


class Library:
    """An attention kernel that somebody else keeps.

    `functions` names what is called of `module`, and the arguments that are given.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]
    majors: ClassVar[tuple[int, ...]]  # of compute capability
    functions: ClassVar[dict[str, tuple[str, ...]]]

    def obstacle(self, major: int, deterministic: bool) -> str:
        """Why it cannot run on such a GPU here; empty where it can."""
        if major not in self.majors:
            wanted = " or ".join(map(str, self.majors))
            return f"{self.name} needs a GPU of compute capability {wanted}"
        try:
            module = importlib.import_module(self.module)
        except Exception as error:  # whatever another package raises is a reason
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is not None and f"{self.module}.".startswith(f"{missing}."):
                return f"{self.name} is not installed ({self.install})"
            return f"{self.name} does not import: {type(error).__name__}: {error}"
        for name, arguments in self.functions.items():
            function = getattr(module, name, None)
            if function is None:
                return f"{self.name} has no {self.module}.{name} in this version"
            # A custom op takes anything; what it was made from knows its arguments.
            signature = inspect.signature(getattr(function, "_init_fn", function))
            try:
                signature.bind(**dict.fromkeys(arguments))
            except TypeError as error:
                return f"{self.name} has another {name} in this version: {error}"
        return ""

    def call(self, name: str, **arguments: Any) -> Any:
        return getattr(importlib.import_module(self.module), name)(**arguments)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: Packed | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse, shaped as those of the op."""
        raise NotImplementedError

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        packed: Packed | None,
        scale: float,
    ) -> Grads:
        raise NotImplementedError


class FlashAttention(Library):
    """What FlashAttention 3 and 4 have in common."""

    asks_lse: ClassVar[str]  # the argument that has forward return lse

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: Packed | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        results: tuple[torch.Tensor, torch.Tensor] = self.call(
            "flash_attn_func" if packed is None else "flash_attn_varlen_func",
            q=query,
            k=key,
            v=value,
            softmax_scale=scale,
            **({} if packed is None else packed.named()),
            **{self.asks_lse: True},
        )
        return results


class FlashAttention3(FlashAttention):
    """Hopper's own instructions (Shah et al., arXiv 2407.08608). Forward always repeats; backward
    has a deterministic switch."""

    name = "FlashAttention 3"
    module = "flash_attn_interface"
    asks_lse = "return_attn_probs"
    install = "built from github.com/Dao-AILab/flash-attention, folder hopper"
    majors = (9,)
    functions: ClassVar = {
        "flash_attn_func": ("q", "k", "v", "softmax_scale", "return_attn_probs"),
        "flash_attn_varlen_func": (
            *("q", "k", "v", "softmax_scale", "return_attn_probs"),
            *_OFFSETS,
        ),
        "_flash_attn_backward": (
            *("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"),
            *("softmax_scale", "deterministic", *_OFFSETS),
        ),
    }

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        packed: Packed | None,
        scale: float,
    ) -> Grads:
        grads = tuple(
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
        )
        self.call(
            "_flash_attn_backward",
            dout=grad_out,
            q=query,
            k=key,
            v=value,
            out=out,
            softmax_lse=lse,
            dq=grads[0],
            dk=grads[1],
            dv=grads[2],
            softmax_scale=scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **({} if packed is None else packed.named()),
        )
        return grads


class FlashAttention4(FlashAttention):
    """Hopper's and Blackwell's own instructions, compiled at the first call of each kind. Forward
    always repeats; backward has a deterministic switch, but not on compute capability 12."""

    name = "FlashAttention 4"
    module = "flash_attn.cute.interface"
    asks_lse = "return_lse"
    install = "pip install jepa-kernels[flash]"
    majors = (9, 10, 11, 12)
    functions: ClassVar = {
        "flash_attn_func": ("q", "k", "v", "softmax_scale", "return_lse"),
        "flash_attn_varlen_func": ("q", "k", "v", "softmax_scale", "return_lse", *_OFFSETS),
        "_flash_attn_bwd": (
            *("q", "k", "v", "out", "dout", "lse", "softmax_scale", "deterministic"),
            *_OFFSETS,
        ),
    }

    def obstacle(self, major: int, deterministic: bool) -> str:
        if major == 12 and deterministic:
            return f"{self.name} has no deterministic backward on compute capability 12"
        return super().obstacle(major, deterministic)

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        packed: Packed | None,
        scale: float,
    ) -> Grads:
        grads: Grads = self.call(
            "_flash_attn_bwd",
            q=query,
            k=key,
            v=value,
            out=out,
            dout=grad_out,
            lse=lse,
            softmax_scale=scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **({} if packed is None else packed.named()),
        )
        return grads


class TorchVarlen(Library):
    """torch.nn.attention.varlen, which is FlashAttention 2 unless torch was told to use another.
    torch itself reads the deterministic switch."""

    name = "torch's varlen attention"
    module = "torch.nn.attention.varlen"
    install = "torch 2.10 or later"
    majors = (8, 9, 10, 11, 12)
    functions: ClassVar = {
        "varlen_attn": (
            *("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
            *("return_aux", "scale"),
        ),
        "AuxRequest": ("lse",),
    }

    def obstacle(self, major: int, deterministic: bool) -> str:
        if not torch.backends.cuda.is_flash_attention_available():
            return f"{self.name} is not in this build of torch"
        return super().obstacle(major, deterministic)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: Packed | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if packed is None:
            batch, rows = query.shape[:2]
            q, k, v = (t.flatten(0, 1) for t in (query, key, value))
            out, lse = self.forward(q, k, v, _as_packed(query, key), scale)
            return out.view(query.shape), lse.unflatten(1, (batch, rows)).transpose(0, 1)
        out, lse = self.call(
            "varlen_attn",
            query=query,
            key=key,
            value=value,
            cu_seq_q=packed.offsets_q,
            cu_seq_k=packed.offsets_k,
            max_q=packed.longest_q,
            max_k=packed.longest_k,
            return_aux=self.call("AuxRequest", lse=True),
            scale=scale,
        )
        # FlashAttention 2 gives +inf to the queries of a sequence without keys.
        return out, lse.masked_fill_(lse == torch.inf, -torch.inf)

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        packed: Packed | None,
        scale: float,
    ) -> Grads:
        if packed is None:
            g, q, k, v, o = (t.flatten(0, 1) for t in (grad_out, query, key, value, out))
            flat_lse = lse.transpose(0, 1).flatten(1, 2)
            grads = self.backward(g, q, k, v, o, flat_lse, _as_packed(query, key), scale)
            shapes = (query.shape, key.shape, value.shape)
            return tuple(g.view(shape) for g, shape in zip(grads, shapes, strict=True))
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        made: Grads = torch.ops.aten._flash_attention_backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            packed.offsets_q,
            packed.offsets_k,
            packed.longest_q,
            packed.longest_k,
            0.0,
            False,
            no_dropout,
            no_dropout.new_empty(0),
            scale=scale,
        )
        return made


def _as_packed(query: torch.Tensor, key: torch.Tensor) -> Packed:
    """A dense batch as sequences of equal length."""
    (batch, rows_q), rows_k = query.shape[:2], key.shape[1]
    offsets_q, offsets_k = (
        torch.arange(batch + 1, dtype=torch.int32, device=query.device).mul_(rows)
        for rows in (rows_q, rows_k)
    )
    return Packed(offsets_q, offsets_k, rows_q, rows_k, batch * rows_q, batch * rows_k)


LIBRARIES: tuple[Library, ...] = (FlashAttention3(), FlashAttention4(), TorchVarlen())


def unsupported(inputs: Inputs) -> list[Reason]:
    reasons = triton_runtime.unavailable_reasons(inputs.device_type)
    reasons += shape_reasons(inputs, _DTYPES) + times_reasons(inputs)
    if not inputs.scale > 0:
        reasons.append(Reason(f"scale must be positive, got {inputs.scale}"))
    obstacles = _obstacles(torch.are_deterministic_algorithms_enabled())
    if all(obstacles):
        reasons += [Reason(text, "machine") for text in obstacles]
    return reasons


def _obstacles(deterministic: bool) -> tuple[str, ...]:
    """What keeps each of `LIBRARIES` from this machine's GPU; empty for one that runs."""
    return _kept_obstacles(deterministic)


# What torch.compiler.assume_constant_result sets; calling that would import Dynamo, and Triton with
# it, wherever this package is imported.
_obstacles._dynamo_marked_constant = True  # type: ignore[attr-defined] # an attribute for Dynamo


@functools.cache
def _kept_obstacles(deterministic: bool) -> tuple[str, ...]:
    major, _ = capability.first_device()
    return tuple(library.obstacle(major, deterministic) for library in LIBRARIES)


def library() -> Library | None:
    """The one that runs on this machine."""
    obstacles = _obstacles(torch.are_deterministic_algorithms_enabled())
    fitting = (found for found, why in zip(LIBRARIES, obstacles, strict=True) if not why)
    return next(fitting, None)


def _library_name() -> str:
    found = library()
    return "" if found is None else found.name


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = inputs.query, inputs.key, inputs.value
    packed = _packed(inputs)
    if _is_empty(inputs, packed):
        lse = query.new_full(inputs.lse_shape(), -torch.inf, dtype=torch.float32)
        return query.new_zeros(query.shape), lse
    attention = library()
    assert attention is not None
    with triton_runtime.device_of(query):
        query, key = _rotated(inputs, query, key)
        out, lse = attention.forward(query, key, _aligned(value), packed, inputs.scale)
        if list(lse.shape) != inputs.lse_shape():
            wanted = f"be of shape {inputs.lse_shape()}"
            raise RuntimeError(
                checks.sentence(NAME, f"lse of {attention.name}", wanted, list(lse.shape))
            )
        if packed is not None:
            _clear_slack(out, 0, packed.end_q, packed.offsets_q, 0.0)
            _clear_slack(lse, 1, packed.end_q, packed.offsets_q, -torch.inf)
    return out.contiguous(), lse.contiguous()


def backward(
    inputs: Inputs, saved: list[torch.Tensor], grad_out: torch.Tensor, needs: list[bool]
) -> Grads:
    query, key, value = inputs.query, inputs.key, inputs.value
    out, lse = saved
    packed = _packed(inputs)
    if _is_empty(inputs, packed):
        return tuple(t.new_zeros(t.shape) for t in (query, key, value))
    attention = library()
    assert attention is not None
    with triton_runtime.device_of(query):
        query, key = _rotated(inputs, query, key)
        grads = attention.backward(
            _aligned(grad_out.contiguous()),
            query,
            key,
            _aligned(value),
            out,
            lse,
            packed,
            inputs.scale,
        )
        if packed is not None:
            _clear_slack(grads[0], 0, packed.end_q, packed.offsets_q, 0.0)
            for grad in grads[1:]:
                _clear_slack(grad, 0, packed.end_k, packed.offsets_k, 0.0)
        grad_query, grad_key = _rotated(inputs, grads[0], grads[1], transposed=True)
    return tuple(g.contiguous() for g in (grad_query, grad_key, grads[2]))


def _is_empty(inputs: Inputs, packed: Packed | None) -> bool:
    """No query meets a key, whatever the values are."""
    if inputs.query.numel() == 0 or inputs.key.numel() == 0:
        return True
    return packed is not None and 0 in (
        packed.offsets_q.shape[0] - 1,
        packed.longest_q,
        packed.longest_k,
    )


# Of offsets that were read: (version of the tensor, rows, longest sequence, last offset).
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _packed(inputs: Inputs) -> Packed | None:
    if inputs.cu_seqlens_q is None:
        return None
    assert inputs.cu_seqlens_k is not None  # given with those of queries
    sides = (
        ("cu_seqlens_q", inputs.cu_seqlens_q, inputs.query.shape[0]),
        ("cu_seqlens_k", inputs.cu_seqlens_k, inputs.key.shape[0]),
    )
    (longest_q, end_q), (longest_k, end_k) = (_extent(*side) for side in sides)
    offsets_q, offsets_k = (offsets.to(torch.int32).contiguous() for _, offsets, _ in sides)
    return Packed(offsets_q, offsets_k, longest_q, longest_k, end_q, end_k)


def _extent(argument: str, offsets: torch.Tensor, rows: int) -> tuple[int, int | None]:
    """The longest sequence and the last offset.

    A graph that records may replay other offsets: the number of rows bounds any sequence.
    """
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        return rows, None
    version = -1 if offsets.is_inference() else offsets._version
    kept: tuple[int, int, int, int] | None = _read.get(offsets)
    if kept is not None and version >= 0 and kept[:2] == (version, rows):
        return kept[2:]
    on_host = offsets.cpu()
    checks.offsets_valid(NAME, argument, on_host, rows)
    longest = int(on_host.diff().max()) if len(on_host) > 1 else 0
    _read[offsets] = (version, rows, longest, int(on_host[-1]))
    return longest, int(on_host[-1])


def _clear_slack(
    x: torch.Tensor, axis: int, end: int | None, offsets: torch.Tensor, value: float
) -> None:
    """Writes `value` to the rows past the last offset: they belong to no sequence, so that a
    library leaves them as they were."""
    rows = x.shape[axis]
    if end is None:
        past = torch.arange(rows, device=x.device) >= offsets[-1]
        x.masked_fill_(past.view(-1, *[1] * (x.dim() - axis - 1)), value)
    elif end < rows:
        x.narrow(axis, end, rows - end).fill_(value)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` in rows that start on 16 bytes, as the libraries' loads want them."""
    if alignment(x) == 8 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _rotated(
    inputs: Inputs, query: torch.Tensor, key: torch.Tensor, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """R(query, query_ids) and R(key, key_ids) in rows of heads side by side, in one launch; or the
    transpose, for gradients. Without positions, the tensors themselves."""
    if inputs.rope_table is None:
        return _aligned(query), _aligned(key)
    from .triton_turn import turn_kernel

    rotated = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key)]
    batch = 1 if inputs.packed else query.shape[0]
    rows = [t.shape[-3] for t in (query, key)]
    tiles = [-(-count // ROTATE_TILE.block_q) for count in rows]
    heads_each = min(ROTATE_HEADS, inputs.heads)
    align = alignment(query, key)
    main, tail = channels(inputs.dtype, inputs.head_dim)
    turn_kernel[(batch * sum(tiles), -(-inputs.heads // heads_each))](
        query,
        key,
        *rotated,
        inputs.query_ids,
        inputs.key_ids,
        inputs.rope_table,
        *rows,
        inputs.heads,
        *tiles,
        *(int(size) for size in inputs.grid),
        *(stride // align for t in (query, key) for stride in panel_strides(t)),
        *id_strides(inputs.query_ids),
        *id_strides(inputs.key_ids),
        HEAD_DIM=inputs.head_dim,
        MAIN=main,
        TAIL=tail,
        ROPE_DIM=rope_dim(inputs.head_dim),
        ALIGN=align,
        BLOCK=ROTATE_TILE.block_q,
        HEADS_EACH=heads_each,
        TRANSPOSED=transposed,
        **launch_options(ROTATE_TILE),
    )
    return rotated[0], rotated[1]


BACKEND = Backend(
    "flash",
    triton_runtime.DEVICES,
    unsupported,
    forward,
    backward,
    facts={"library": _library_name},
)
