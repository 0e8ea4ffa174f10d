"""Cases of visible_patch_embed for tests: inputs, the float64 oracle, and the comparison. Public,
so that a new backend can be held to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..backend import resolve
from ..ops.visible_patch_embed.contract import OP, prepare
from . import assert_within_budget

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)
Layout = Literal["dense", "shared", "packed"]


@dataclass(frozen=True)
class EmbeddingCase:
    """Inputs of one call: pixels and weights that the dtypes represent exactly."""

    clip: torch.Tensor  # uint8, or float64
    clip_dtype: torch.dtype
    weight: torch.Tensor
    bias: torch.Tensor | None
    ids: torch.Tensor
    cu_seqlens: torch.Tensor | None
    grad_out: torch.Tensor
    dtype: torch.dtype
    normalised: bool


def embedding_case(
    batch: int = 2,
    grid: tuple[int, int, int] = (2, 3, 4),
    tubelet: tuple[int, int, int] = (2, 4, 4),
    *,
    channels: int = 3,
    width: int = 20,
    visible: int | None = 7,
    layout: Layout = "dense",
    clip_dtype: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    normalised: bool = True,
    channels_last: bool = False,
    repeated: bool = False,
    ids_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> EmbeddingCase:
    """A random case.

    Args:
        batch, grid, tubelet, channels, width: B, (T, H, W), (pt, ph, pw), C and D.
        visible: ids of a clip; None: all of them. Packed sequences are up to so many longer or
            shorter, and there are two for each clip.
        layout: ids ``[B, N]``, ``[N]`` or packed.
        clip_dtype, dtype: of the pixels, and of weight and bias.
        normalised: with MEAN and STD of each channel.
        channels_last: the clip is a view of ``[B, frames, height, width, C]``.
        repeated: ids are drawn with replacement.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1] * grid[2]
    count = tokens if visible is None else visible

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def some(number: int) -> torch.Tensor:
        if repeated:
            return torch.randint(tokens, (number,), generator=generator).to(ids_dtype)
        return torch.randperm(tokens, generator=generator)[:number].to(ids_dtype)

    shape = (batch, channels, *(g * t for g, t in zip(grid, tubelet, strict=True)))
    if clip_dtype == torch.uint8:
        clip = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    else:
        clip = values(*shape).to(clip_dtype).double()
    if channels_last:
        clip = clip.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    cu_seqlens = None
    if layout == "packed":
        lengths = [min(tokens, max(0, count + (-2, 1, 0, 2)[i % 4])) for i in range(2 * batch)]
        ids = torch.cat([torch.zeros(0, dtype=ids_dtype), *map(some, lengths)])
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        rows: tuple[int, ...] = (len(ids),)
    elif layout == "shared":
        ids, rows = some(count), (batch, count)
    else:
        ids = torch.cat([torch.zeros(0, dtype=ids_dtype), *map(some, [count] * batch)])
        ids, rows = ids.view(batch, count), (batch, count)
    weight = values(width, channels, *tubelet).div(sum(tubelet)).to(dtype).double()
    return EmbeddingCase(
        clip,
        clip_dtype,
        weight,
        values(width).to(dtype).double() if bias else None,
        ids,
        cu_seqlens,
        values(*rows, width).to(dtype).double(),
        dtype,
        normalised,
    )


def run_embedding(
    case: EmbeddingCase, backend: str, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Output and gradients of one backend, in the case's dtypes unless another is named."""

    def placed(t: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        moved = t.to(device=device, dtype=kind if dtype is None else dtype)
        return moved.detach().requires_grad_()

    leaves = {"weight": placed(case.weight, case.dtype)}
    if case.bias is not None:
        leaves["bias"] = placed(case.bias, case.dtype)
    clip = case.clip.to(device)
    if case.clip_dtype != torch.uint8:
        clip = leaves["clip"] = placed(clip, case.clip_dtype)
    channels = clip.shape[1]
    inputs = prepare(
        clip,
        leaves["weight"],
        leaves.get("bias"),
        ids=case.ids.to(device),
        cu_seqlens=None if case.cu_seqlens is None else case.cu_seqlens.to(device),
        mean=MEAN[:channels] if case.normalised else None,
        std=STD[:channels] if case.normalised else None,
    )
    out = OP.run(inputs, resolve(OP, inputs, backend))[0]
    grads = torch.autograd.grad(out, list(leaves.values()), case.grad_out.to(out))
    return {"out": out.detach().cpu()} | {
        f"grad_{name}": grad.cpu() for name, grad in zip(leaves, grads, strict=True)
    }


def check_embedding(
    case: EmbeddingCase, backend: str, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Runs `backend` and holds its results to the error budget against the float64 reference.

    Raises:
        AssertionError: naming the tensor, its error and the budget.
    """
    oracle = run_embedding(case, "reference", torch.float64)
    wide = case.dtype in (torch.float32, torch.float64)
    peer = None if wide else run_embedding(case, "reference")
    actual = run_embedding(case, backend, device=device)
    for name, tensor in actual.items():
        kind = case.clip_dtype if wide and name == "grad_clip" else case.dtype
        rounded = None if peer is None else peer[name]
        if wide and kind not in (torch.float32, torch.float64):
            rounded = run_embedding(case, "reference")[name]
        assert_within_budget(
            f"{backend} {name}",
            tensor,
            oracle[name],
            rounded,
            gradient=name.startswith("grad"),
            dtype=kind,
        )
    return actual
