"""visible_patch_embed's kernels through their C ABI: those of a CPU, and those of a GPU on the SIMT
executor. Sanitized children need only `Library` and NumPy arrays: torch is imported by `Ops` alone.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from tests.abi.header import read

ABI = read("visible_patch_embed")
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "uint8": ABI.constants["JK_UINT8"]}
STRIDES = ("clip_stride", "channel_stride", "frame_stride", "line_stride", "pixel_stride")


class Library:
    """The kernels of one kind of device; `more` are the arguments behind the parameters. A refusal
    becomes a RuntimeError."""

    def __init__(self, path: str | Path, device: str, more: tuple[Any, ...]) -> None:
        self.library, self.device, self.more = ABI.open(path), device, more

    def piece_rows(self, count: int, width: int, numbers: int) -> int:
        return self.library.jk_visible_patch_embed_cuda_piece_rows(count, width, numbers)

    def call(self, name: str, **values: Any) -> None:
        """Runs a kernel; a value is a number, None, or something with an address."""
        params = ABI.structs["jk_visible_patch_embed_params"]()
        for field, value in values.items():
            setattr(params, field, value if isinstance(value, (int, float)) else _address(value))
        function = getattr(self.library, f"jk_visible_patch_embed_{self.device}_{name}")
        error = function(ctypes.byref(params), *self.more)
        if error is not None:
            raise RuntimeError(error.decode())


def on_the_executor(path: str | Path) -> Library:
    return Library(path, "cuda", (None,))


def _address(value: Any) -> int | None:
    if value is None:
        return None
    return value.data_ptr() if hasattr(value, "data_ptr") else value.ctypes.data


def layout(shape: Any, strides: Any, tubelet: Any) -> dict[str, int]:
    """The fields of a clip [B, C, frames, height, width], strides in elements."""
    batch, channels, *sizes = shape
    grid = [size // side for size, side in zip(sizes, tubelet, strict=True)]
    names = ("batch", "channels", "steps", "lines", "sites", "depth", "high", "wide", *STRIDES)
    return dict(zip(names, (batch, channels, *grid, *tubelet, *strides), strict=True))


class Ops:
    """What `native_ops.OPS` offers, on a library; results lie between fences of NaN."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def visible_patch_embed_gather_(self, pixels, clip, rows, normalisation, *rest):
        memory, inside = _fenced(tuple(pixels.shape), pixels.dtype)
        self.library.call(
            "gather",
            **_described(clip, normalisation, rest[:3]),
            rows=rows,
            count=len(rows),
            pixels=inside,
            pixels_dtype=_code(inside),
        )
        _check_fences(memory, inside)
        pixels.copy_(inside)

    def visible_patch_embed_scatter_(self, clip, of_pixels, order, starts, normalisation, *rest):
        memory, inside = _fenced(tuple(clip.shape), clip.dtype)
        self.library.call(
            "scatter",
            **_described(inside, normalisation, rest[:3]),
            count=len(order),
            of_pixels=of_pixels,
            order=order,
            starts=starts,
            clip_gradient=inside,
        )
        _check_fences(memory, inside)
        clip.copy_(inside)

    def visible_patch_embed_embed(self, clip, rows, normalisation, weight, bias):
        memory, out = _fenced((len(rows), weight.shape[0]), weight.dtype)
        self.library.call(
            "embed",
            **_described(clip, normalisation, weight.shape[2:]),
            rows=rows,
            count=len(rows),
            weight=weight,
            bias=bias,
            out=out,
            width=weight.shape[0],
            dtype=_code(weight),
        )
        _check_fences(memory, out)
        return out

    def visible_patch_embed_weight_gradient(self, clip, rows, normalisation, grad_out, *tubelet):
        import torch

        width = grad_out.shape[1]
        numbers = clip.shape[1] * tubelet[0] * tubelet[1] * tubelet[2]
        piece_rows = self.library.piece_rows(len(rows), width, numbers)
        pieces = max(1, -(-len(rows) // piece_rows))
        memory, out = _fenced((pieces, width, numbers), torch.float32)
        self.library.call(
            "weight_gradient",
            **_described(clip, normalisation, tubelet),
            rows=rows,
            count=len(rows),
            grad_out=grad_out,
            width=width,
            dtype=_code(grad_out),
            weight_gradient=out,
            pieces=pieces,
            piece_rows=piece_rows,
        )
        _check_fences(memory, out)
        return out


def _code(tensor) -> int:
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _described(clip, normalisation, tubelet) -> dict[str, Any]:
    return {
        **layout(clip.shape, clip.stride(), tubelet),
        "clip": clip,
        "clip_dtype": _code(clip),
        "gain": normalisation[0],
        "shift": normalisation[1],
    }


_FENCE = 64


def _fenced(shape: tuple[int, ...], dtype):
    import torch

    count = 1
    for size in shape:
        count *= size
    memory = torch.full((count + 2 * _FENCE,), torch.nan, dtype=dtype)
    return memory, memory[_FENCE : _FENCE + count].view(shape)


def _check_fences(memory, inside) -> None:
    assert memory[:_FENCE].isnan().all() and memory[-_FENCE:].isnan().all(), "written outside"
    assert not inside.isnan().any() or inside.numel() == 0, "an element was not written"


def run_on(monkeypatch, backend: str, library: Library) -> None:
    """A backend of C++ kernels runs on `library` in the place of the native torch ops, and takes
    CPU tensors."""
    from dataclasses import replace

    from jepa_kernels.backend import OPS
    from jepa_kernels.ops.visible_patch_embed import native_ops
    from jepa_kernels.ops.visible_patch_embed.inputs import NAME

    monkeypatch.setattr(native_ops, "OPS", Ops(library))
    backends = OPS[NAME].backends
    willing = replace(backends[backend], unsupported=lambda inputs: [])
    monkeypatch.setitem(backends, backend, willing)
