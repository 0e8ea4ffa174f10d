"""Triton backend: NVIDIA GPUs from compute capability 8.0, and CPU tensors under
TRITON_INTERPRET=1. The kernels are imported on first use.

Nothing here reads a tensor's values: the grid is an upper bound of the tiles a ragged batch can
need, so a call never waits for the device and can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ... import triton_runtime
from ...backend import Backend, Reason
from ...rope3d import rope_dim
from .inputs import Inputs, rows_of_channels, shape_reasons
from .triton_launch import alignment, id_strides, launch_options, panel_strides
from .triton_table import ROTATE_HEADS, ROTATE_TILE, Tile, channels, tile

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SEARCH_FANOUT = 128  # of triton_tiles.find_sequence


def unsupported(inputs: Inputs) -> list[Reason]:
    return triton_runtime.unavailable_reasons(inputs.device_type) + shape_reasons(inputs, _DTYPES)


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_kernels import masked_attention_fwd_kernel

    query, key, value = inputs.query, inputs.key, inputs.value
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    case = _Case(inputs)
    lse = query.new_empty(inputs.lse_shape(), dtype=torch.float32)
    with triton_runtime.device_of(query):
        if inputs.rope_table is not None:
            key = case.rotated(key, inputs.key_ids)
        case.launch(
            masked_attention_fwd_kernel,
            "fwd",
            query,
            (
                query,
                key,
                value,
                out,
                lse,
                inputs.query_ids,
                inputs.rope_table,
                inputs.cu_seqlens_q,
                inputs.cu_seqlens_k,
                inputs.query_times,
                inputs.key_times,
            ),
            {"q": query, "k": key, "v": value, "o": out},
            inputs.query_ids,
            log2_scale=_log2_scale(inputs.scale),
            NEGATIVE=inputs.scale < 0,
        )
    return out, lse


def backward(
    inputs: Inputs, saved: list[torch.Tensor], grad_out: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .triton_kernels_bwd import masked_attention_bwd_kv_kernel, masked_attention_bwd_q_kernel

    query, key, value = inputs.query, inputs.key, inputs.value
    out, lse = saved
    grad_out = rows_of_channels(grad_out)
    grad_query, grad_key, grad_value = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
    )
    case = _Case(inputs)
    delta, log2_lse = torch.empty_like(lse), torch.empty_like(lse)
    places = (
        inputs.rope_table,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        inputs.query_times,
        inputs.key_times,
    )
    with triton_runtime.device_of(query):
        if inputs.rope_table is not None:
            query = case.rotated(query, inputs.query_ids)
            key = case.rotated(key, inputs.key_ids)
        read = {"q": query, "k": key, "v": value, "g": grad_out}
        case.launch(
            masked_attention_bwd_q_kernel,
            "bwd_q",
            query,
            (
                grad_out,
                query,
                key,
                value,
                out,
                lse,
                log2_lse,
                delta,
                grad_query,
                inputs.query_ids,
                *places,
            ),
            {**read, "o": out},
            inputs.query_ids,
            scale=inputs.scale,
        )
        case.launch(
            masked_attention_bwd_kv_kernel,
            "bwd_kv",
            key,
            (
                grad_out,
                query,
                key,
                value,
                log2_lse,
                delta,
                grad_key,
                grad_value,
                inputs.key_ids,
                *places,
            ),
            {**read, "o": grad_key},
            inputs.key_ids,
            scale=inputs.scale,
        )
    return grad_query, grad_key, grad_value


class _Case:
    """One call's sizes, and the launches that share them."""

    def __init__(self, inputs: Inputs) -> None:
        query, key = inputs.query, inputs.key
        self.query, self.rope_table = query, inputs.rope_table
        self.packed = inputs.packed
        self.batch = 1 if self.packed else query.shape[0]
        self.rows = {"q": query.shape[-3], "k": key.shape[-3]}
        self.heads, self.head_dim = query.shape[-2:]
        offsets = inputs.cu_seqlens_q
        self.num_seqs = 0 if offsets is None else offsets.shape[0] - 1
        self.grid = [int(size) for size in inputs.grid]
        self.times = {"tq": inputs.query_times, "tk": inputs.key_times}
        self.window = inputs.window
        self.architecture = triton_runtime.architecture(query.device)

    def scratch(self, x: torch.Tensor) -> torch.Tensor:
        """Like `x`, with the rows of one head side by side in memory."""
        if self.packed:
            return x.new_empty((x.shape[1], x.shape[0], x.shape[2])).transpose(0, 1)
        return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)

    def rotated(self, x: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        """R(x, ids), computed once because the attention kernels read every row many times."""
        from .triton_kernels import rotate_rows_kernel

        rotated = self.scratch(x)
        if x.numel() == 0:
            return rotated
        rows = x.shape[-3]
        tiles = -(-rows // ROTATE_TILE.block_q)
        heads_each = min(ROTATE_HEADS, self.heads)
        align = alignment(x)
        main, tail = channels(self.query.dtype, self.head_dim)
        rotate_rows_kernel[(tiles * self.batch, -(-self.heads // heads_each))](
            x,
            rotated,
            ids,
            self.rope_table,
            rows,
            self.heads,
            tiles,
            *(s // align for s in panel_strides(x)),
            *id_strides(ids),
            *self.grid,
            HEAD_DIM=self.head_dim,
            MAIN=main,
            TAIL=tail,
            ROPE_DIM=rope_dim(self.head_dim),
            ALIGN=align,
            BLOCK=ROTATE_TILE.block_q,
            HEADS_EACH=heads_each,
            **launch_options(ROTATE_TILE),
        )
        return rotated

    def launch(
        self,
        kernel: Any,
        name: str,
        owned: torch.Tensor,
        pointers: tuple[torch.Tensor | None, ...],
        panels: dict[str, torch.Tensor],
        ids: torch.Tensor | None,
        **extra: Any,
    ) -> None:
        """Runs `kernel` with one program per tile of `owned` and head."""
        if owned.numel() == 0:
            return
        times = self.times["tq"] is not None
        shape = tile(name, self.architecture, self.query.dtype, self.head_dim, times)
        tiles = self._tiles(owned.shape[-3], shape.block_k if name == "bwd_kv" else shape.block_q)
        align = alignment(*panels.values())
        strides = {
            f"{p}_{axis}": s // align
            for p, x in panels.items()
            for axis, s in zip(("batch", "row", "head"), panel_strides(x), strict=True)
        }
        numbers = {"id": None if self.rope_table is None else ids, **self.times}
        for argument, list_ in numbers.items():
            strides[f"{argument}_batch"], strides[f"{argument}_row"] = (
                (0, 0) if list_ is None else id_strides(list_)
            )
        grid_t, grid_h, grid_w = self.grid
        fixed = constants(
            self.query.dtype,
            self.head_dim,
            self.rope_table is not None,
            self.packed,
            times,
            align,
            self._search_steps(),
            shape,
        )
        kernel[(tiles * self.batch * self.heads,)](
            *pointers,
            **extra,
            rows_q=self.rows["q"],
            rows_k=self.rows["k"],
            num_seqs=self.num_seqs,
            heads=self.heads,
            tiles=tiles,
            grid_t=grid_t,
            grid_h=grid_h,
            grid_w=grid_w,
            **strides,
            window=self.window,
            **fixed,
            **launch_options(shape),
        )

    def _tiles(self, rows: int, block: int) -> int:
        """Tiles of one head and batch entry; for ragged rows the bound that
        triton_tiles.find_sequence numbers within."""
        return rows // block + self.num_seqs + 1 if self.packed else -(-rows // block)

    def _search_steps(self) -> int:
        steps, reach = 1, _SEARCH_FANOUT
        while reach < self.num_seqs + 1:
            steps, reach = steps + 1, reach * _SEARCH_FANOUT
        return steps


def constants(
    dtype: torch.dtype,
    head_dim: int,
    rope: bool,
    packed: bool,
    times: bool,
    align: int,
    search_steps: int,
    shape: Tile,
) -> dict[str, Any]:
    """The compile-time arguments that the three attention kernels share; the compile gate builds
    the same ones."""
    main, tail = channels(dtype, head_dim)
    return {
        "HEAD_DIM": head_dim,
        "MAIN": main,
        "TAIL": tail,
        "ROPE_DIM": rope_dim(head_dim) if rope else 0,
        "CHUNKED": dtype == torch.float32,
        "ALIGN": align,
        "PACKED": packed,
        "TIMES": times,
        "SEARCH_STEPS": search_steps,
        "BLOCK_Q": shape.block_q,
        "BLOCK_K": shape.block_k,
    }


def _log2_scale(scale: float) -> float:
    """scale * log2(e). The floor keeps a scale of 0 from making 0 * inf of a masked key; the
    products it scales then vanish anyway."""
    magnitude = max(abs(scale), 1e-30) * math.log2(math.e)
    return -magnitude if scale < 0 else magnitude


BACKEND = Backend("triton", triton_runtime.DEVICES, unsupported, forward, backward)
