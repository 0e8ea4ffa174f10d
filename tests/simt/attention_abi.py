"""Calls the C ABI of csrc/masked_attention (params.h) on NumPy arrays; needs no torch, so sanitized
children can use it.

float16 and bfloat16 tensors are uint16 arrays of their bits. Element strides are those of the
arrays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np

from tests.abi.header import read

SOURCE = "csrc/masked_attention/cuda/launch.cu"
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_GUARD = 64


ABI = read("masked_attention")
Rows, Ints, Params = (
    ABI.structs[name] for name in ("jk_rows", "jk_ints", "jk_masked_attention_params")
)
open_attention = ABI.open


def values(array: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that an array of `dtype` holds; float32 arrays (lse, too) are their own."""
    if array.dtype != np.uint16:
        return array
    return (
        array.view(np.float16)
        if dtype == "float16"
        else (array.astype(np.uint32) << 16).view(np.float32)
    )


def rows(array: np.ndarray) -> Rows:
    """[tokens, heads, head_dim] (packed) or [B, tokens, heads, head_dim]."""
    strides = [s // array.itemsize for s in array.strides]
    return Rows(array.ctypes.data, 0 if array.ndim == 3 else strides[0], *strides[-3:-1])


def ints(array: np.ndarray | None) -> Ints:
    if array is None:
        return Ints(None, 0, 0, 0)
    strides = [s // array.itemsize for s in array.strides]
    return Ints(
        array.ctypes.data, array.itemsize, strides[0] if array.ndim == 2 else 0, strides[-1]
    )


def describe(inputs: Mapping[str, np.ndarray]) -> Params:
    """Params of the inputs `run` takes, without outputs and scratch."""
    query, key = inputs["query"], inputs["key"]
    packed = query.ndim == 3
    p = Params()
    p.dtype = DTYPES[str(inputs["dtype"])]
    p.num_seqs = len(inputs["cu_q"]) - 1 if packed else query.shape[0]
    p.len_q, p.heads, p.head_dim = query.shape[-3:]
    p.len_k = key.shape[-3]
    for name in ("cu_q", "cu_k", "ids_q", "ids_k", "times_q", "times_k"):
        setattr(p, name, ints(inputs.get(name)))
    p.window = int(inputs.get("window", 0))
    if "rope_table" in inputs:
        p.rope_table = inputs["rope_table"].ctypes.data
        p.rope_dim = inputs["rope_table"].shape[2]
        p.grid_t, p.grid_h, p.grid_w = (int(g) for g in inputs["grid"])
    p.scale = float(inputs["scale"])
    p.q, p.k, p.v, p.grad_out = (rows(inputs[n]) for n in ("query", "key", "value", "grad_out"))
    return p


class Guarded:
    """An array surrounded by bytes that nothing may write; its elements start as 0xff (NaN)."""

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype | type, misaligned: bool = False
    ) -> None:
        bytes_needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.buffer = np.full(bytes_needed + 2 * _GUARD + 16, 0xFF, np.uint8)
        # Offsets from a 16-byte boundary: 0, or one element so that no vector access is possible.
        start = (
            _GUARD
            + -(self.buffer.ctypes.data + _GUARD) % 16
            + (np.dtype(dtype).itemsize if misaligned else 0)
        )
        self.array = self.buffer[start : start + bytes_needed].view(dtype).reshape(shape)
        self.outside = np.ones(self.buffer.size, bool)
        self.outside[start : start + bytes_needed] = False

    def intact(self) -> bool:
        return bool((self.buffer[self.outside] == 0xFF).all())


class AttentionError(RuntimeError):
    """The sentence that a kernel returned."""


def _call(library: ctypes.CDLL, p: Params, backward: bool) -> None:
    scratch = Guarded((library.jk_masked_attention_cuda_scratch(p, int(backward)),), np.uint8)
    p.scratch, p.scratch_bytes = scratch.array.ctypes.data, scratch.array.size
    function = (
        library.jk_masked_attention_cuda_bwd if backward else library.jk_masked_attention_cuda_fwd
    )
    sentence = function(p, None)
    if sentence is not None:
        raise AttentionError(sentence.decode())
    if not scratch.intact():
        raise AttentionError("the kernel wrote outside its scratch space")


def run(
    library: ctypes.CDLL,
    inputs: Mapping[str, np.ndarray],
    backward: bool = True,
    misaligned: bool = False,
) -> dict[str, np.ndarray]:
    """out, lse and with `backward` the gradients; every output starts as NaN between guard bytes.

    Args:
        inputs: query, key, value, grad_out, scale, dtype and, where they apply, cu_q, cu_k, ids_q,
            ids_k, rope_table, grid, times_q, times_k, window.
        misaligned: put outputs at addresses that allow no vector access.
    """
    query, key = inputs["query"], inputs["key"]
    packed = query.ndim == 3
    shapes = {
        "out": query.shape,
        "grad_query": query.shape,
        "grad_key": key.shape,
        "grad_value": key.shape,
    }
    outputs = {name: Guarded(shape, query.dtype, misaligned) for name, shape in shapes.items()}
    *batch, tokens, heads, _ = query.shape
    outputs["lse"] = Guarded((*batch, heads, tokens), np.float32)
    p = describe(inputs)
    p.out = rows(outputs["out"].array)
    lse = outputs["lse"].array
    p.lse, p.lse_stride_seq, p.lse_stride_head = (
        lse.ctypes.data,
        0 if packed else heads * tokens,
        tokens,
    )
    _call(library, p, backward=False)
    if backward:
        p.grad_q, p.grad_k, p.grad_v = (
            rows(outputs[n].array) for n in ("grad_query", "grad_key", "grad_value")
        )
        _call(library, p, backward=True)
    written = outputs if backward else {n: outputs[n] for n in ("out", "lse")}
    for name, guarded in written.items():
        if not guarded.intact():
            raise AttentionError(f"the kernel wrote outside {name}")
    return {name: guarded.array for name, guarded in written.items()}
