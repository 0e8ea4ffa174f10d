"""Builds masked_attention's CPU kernels with g++ alone and calls their C ABI through ctypes,
without the torch binding."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.abi.header import read
from tests.native.build import ISAS, Unit, library, units

ABI = read("masked_attention")
Rows, Ints, Params = (
    ABI.structs[name] for name in ("jk_rows", "jk_ints", "jk_masked_attention_params")
)
PARALLEL_FOR = ABI.callbacks["jk_parallel_for"]


def build(folder: Path, emulated: bool) -> Path:
    """A shared library of the kernels; `emulated` compiles those of AVX-512 against SIMDe, so that
    they run on any x86-64 with AVX2."""

    def flags(unit: Unit) -> list[str]:
        # Optimising the emulation harder costs more compile time than it saves.
        return ["-O1" if emulated and "avx512" in unit.isa else "-O2"]

    parts = units("masked_attention")
    return library("attention", folder, [u.emulated() if emulated else u for u in parts], flags)


def serial(pieces: int = 1, order: Callable[[list[int]], list[int]] = list) -> Callable:
    """A jk_parallel_for that cuts every loop into so many pieces and runs them one after the other,
    in the order asked for."""

    def run(count: int, grain: int, body, context) -> None:
        parts = max(1, min(pieces, -(-count // max(grain, 1))))
        for i in order(list(range(parts))):
            body(count * i // parts, count * (i + 1) // parts, context)

    return PARALLEL_FOR(run)


def threaded(threads: int) -> Callable:
    """A jk_parallel_for on so many Python threads (the kernels run without the interpreter's
    lock)."""

    def run(count: int, grain: int, body, context) -> None:
        parts = max(1, min(threads, -(-count // max(grain, 1))))
        with ThreadPoolExecutor(parts) as pool:
            list(
                pool.map(
                    lambda i: body(count * i // parts, count * (i + 1) // parts, context),
                    range(parts),
                )
            )

    return PARALLEL_FOR(run)


def rows(t: torch.Tensor | None, packed: bool) -> Rows:
    if t is None:
        return Rows(None, 0, 0, 0)
    assert t.stride(-1) == 1 or t.numel() == 0
    first = 0 if packed else 1
    return Rows(
        t.data_ptr() or 1, 0 if packed else t.stride(0), t.stride(first), t.stride(first + 1)
    )


def ints(t: torch.Tensor | None) -> Ints:
    if t is None:
        return Ints(None, 0, 0, 0)
    return Ints(
        t.data_ptr() or 1, t.element_size(), t.stride(0) if t.dim() == 2 else 0, t.stride(-1)
    )


@dataclass
class Call:
    """One call of the C ABI: tensors [B, N, heads, head_dim], or [tokens, heads, head_dim] with
    offsets."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    ids_q: torch.Tensor | None = None
    ids_k: torch.Tensor | None = None
    table: torch.Tensor | None = None
    grid: tuple[int, int, int] = (1, 1, 1)
    times_q: torch.Tensor | None = None
    times_k: torch.Tensor | None = None
    window: int = 0
    out: torch.Tensor = field(init=False)
    lse: torch.Tensor = field(init=False)
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.out = torch.full(self.q.shape, float("nan"), dtype=self.q.dtype)
        self.lse = torch.full(
            (*self.q.shape[:-3], self.q.shape[-2], self.q.shape[-3]), float("nan")
        )
        self.grads = tuple(
            torch.full(t.shape, float("nan"), dtype=t.dtype) for t in (self.q, self.k, self.v)
        )

    def params(self, grad_out: torch.Tensor | None) -> Params:
        packed = self.cu_q is not None
        p = Params()
        p.dtype = ABI.constants[f"JK_{str(self.q.dtype).removeprefix('torch.').upper()}"]
        p.heads, p.head_dim = self.q.shape[-2:]
        p.len_q, p.len_k = self.q.shape[-3], self.k.shape[-3]
        p.num_seqs = self.cu_q.numel() - 1 if packed else self.q.shape[0]
        p.cu_q, p.cu_k, p.ids_q, p.ids_k = map(ints, (self.cu_q, self.cu_k, self.ids_q, self.ids_k))
        if self.table is not None:
            p.rope_table, p.rope_dim = self.table.data_ptr(), self.table.shape[-1]
        p.grid_t, p.grid_h, p.grid_w = self.grid
        p.times_q, p.times_k, p.window = ints(self.times_q), ints(self.times_k), self.window
        p.scale = self.scale
        p.q, p.k, p.v, p.out = (rows(t, packed) for t in (self.q, self.k, self.v, self.out))
        p.lse = self.lse.data_ptr() or 1
        p.lse_stride_seq, p.lse_stride_head = (
            0 if packed else self.lse.stride(0),
            self.lse.stride(-2),
        )
        p.grad_out = rows(grad_out, packed)
        p.grad_q, p.grad_k, p.grad_v = (rows(t, packed) for t in self.grads)
        return p


class Library:
    """The loaded kernels; a refusal becomes a ValueError."""

    def __init__(self, path: Path) -> None:
        library = ABI.open(path)
        self.functions = {
            False: library.jk_masked_attention_cpu_fwd,
            True: library.jk_masked_attention_cpu_bwd,
        }

    def raw(self, params: Params, backward: bool, isa: int, parallel_for: Callable) -> None:
        sentence = self.functions[backward](ctypes.byref(params), isa, parallel_for)
        if sentence is not None:
            raise ValueError(sentence.decode())

    def forward(
        self, call: Call, isa: str = "avx2", parallel_for: Callable | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.raw(call.params(None), False, ISAS[isa], parallel_for or serial())
        return call.out, call.lse

    def backward(
        self,
        call: Call,
        grad_out: torch.Tensor,
        isa: str = "avx2",
        parallel_for: Callable | None = None,
    ) -> tuple[torch.Tensor, ...]:
        self.raw(call.params(grad_out), True, ISAS[isa], parallel_for or serial())
        return call.grads
