"""The inputs of one visible_patch_embed call: what they must satisfy, and what backends read of
them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ... import checks
from ...backend import Reason, dtype_reasons
from ...checks import dtype_name
from ...contract import call_inputs, differentiable

NAME = "visible_patch_embed"
CLIP_DTYPES = (torch.uint8, *checks.FLOAT_DTYPES)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXAMPLE_CLIP, _EXAMPLE_KERNEL = (2, 3, 4, 64, 64), (2, 16, 16)


@call_inputs(slots=True)
class Inputs:
    """One call.

    Attributes:
        clip: ``[B, C, frames, height, width]``, uint8 or float, any strides.
        weight: ``[D, C, pt, ph, pw]``, contiguous; its dtype is that of products and of the output.
        bias: ``[D]`` in the dtype of weight, or None.
        normalisation: ``[2, C]``, float32 (float64 for a float64 weight): a pixel x counts as ``x *
            normalisation[0] + normalisation[1]``.
        ids: int32 or int64 ``[N]`` or ``[B, N]``, or packed ``[tokens]`` with cu_seqlens.
        cu_seqlens: ``[sequences + 1]``, or None; sequence s reads clip s mod B.
    """

    clip: torch.Tensor = differentiable()
    weight: torch.Tensor = differentiable()
    bias: torch.Tensor | None = differentiable()
    normalisation: torch.Tensor
    ids: torch.Tensor
    cu_seqlens: torch.Tensor | None

    @property
    def device_type(self) -> str:
        return self.clip.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def batch(self) -> int:
        return self.clip.shape[0]

    @property
    def width(self) -> int:
        """D, channels of a token."""
        return self.weight.shape[0]

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels of a token."""
        depth, high, wide = self.weight.shape[2:]
        return depth, high, wide

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, H, W) in tokens."""
        sizes, sides = self.clip.shape[2:], self.tubelet
        return sizes[0] // sides[0], sizes[1] // sides[1], sizes[2] // sides[2]

    @property
    def tokens(self) -> int:
        """Tokens of a clip."""
        frames, height, width = self.grid
        return frames * height * width

    @property
    def pixels(self) -> int:
        """K, numbers of a token: C * pt * ph * pw."""
        shape = self.weight.shape
        return shape[1] * shape[2] * shape[3] * shape[4]

    @property
    def tokens_shape(self) -> list[int]:
        """The output's shape without channels."""
        shape = list(self.ids.shape)
        return shape if self.cu_seqlens is not None else [self.batch, shape[-1]]

    @property
    def count(self) -> int:
        """Rows of the output."""
        shape = self.tokens_shape
        return shape[0] if len(shape) == 1 else shape[0] * shape[1]

    def matrix(self) -> torch.Tensor:
        """The weight as ``[D, K]``."""
        return self.weight.flatten(1)

    def size_class(self) -> str:
        """``few`` up to 256 rows, else ``many``."""
        return "few" if self.count <= 256 else "many"

    def describe(self) -> str:
        parts = [
            f"clip {list(self.clip.shape)} {dtype_name(self.clip.dtype)} {self.device_type}; "
            f"weight {list(self.weight.shape)} {dtype_name(self.dtype)}",
            f"{self.count} of {self.batch * self.tokens} tokens, "
            + ("packed" if self.cu_seqlens is not None else "dense"),
        ]
        given = (self.clip, self.weight, self.bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
            parts.append("gradients needed")
        return "; ".join(parts)


def outputs(inputs: Inputs, backend: Any = None) -> list[tuple[list[int], torch.dtype]]:
    """The embeddings, and which token of all clips each of them is."""
    return [([*inputs.tokens_shape, inputs.width], inputs.dtype), ([inputs.count], torch.int64)]


def kernel_reasons(inputs: Inputs) -> list[Reason]:
    """Why no kernel can run this call on any machine."""
    reasons = dtype_reasons((inputs.dtype,), _KERNEL_DTYPES)
    if inputs.clip.dtype == torch.float64:
        reasons.append(Reason("clip must be uint8, float32, bfloat16 or float16, got float64"))
    return reasons


def gpu_reasons(inputs: Inputs) -> list[Reason]:
    """Why no kernel of a GPU can: within a clip they count in 32 bits."""
    reasons, clip, most = kernel_reasons(inputs), inputs.clip, 2**31
    pairs = zip(clip.shape[1:], clip.stride()[1:], strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in pairs)
    if span >= most:
        reasons.append(Reason(f"clip must span fewer than 2^31 elements a sample, got {span}"))
    if inputs.batch * inputs.tokens >= most:
        tokens = inputs.batch * inputs.tokens
        reasons.append(Reason(f"clip must have fewer than 2^31 tokens, got {tokens}"))
    return reasons


def check(inputs: Inputs) -> None:
    """Raises a sentence unless shapes, dtypes and devices are those of a call."""
    clip, weight = inputs.clip, inputs.weight
    for argument, tensor, rank, meaning, dtypes in (
        ("clip", clip, 5, "[B, C, frames, height, width]", CLIP_DTYPES),
        ("weight", weight, 5, "[D, C, pt, ph, pw]", checks.FLOAT_DTYPES),
        ("bias", inputs.bias, 1, "[D]", checks.FLOAT_DTYPES),
        ("normalisation", inputs.normalisation, 2, "[2, C]", checks.FLOAT_DTYPES),
        ("cu_seqlens", inputs.cu_seqlens, 1, "[sequences + 1]", checks.ID_DTYPES),
    ):
        if tensor is not None:
            _check_tensor(argument, tensor, clip, dtypes)
            checks.has_rank(NAME, argument, tensor, rank, meaning)
    _check_tensor("ids", inputs.ids, clip, checks.ID_DTYPES)
    _check_sizes(inputs)
    _check_ids(inputs)


def _check_tensor(
    argument: str, tensor: Any, clip: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    checks.is_tensor(NAME, argument, tensor)
    checks.is_strided(NAME, argument, tensor)
    checks.has_dtype(NAME, argument, tensor, dtypes)
    checks.same_device(NAME, argument, tensor, clip.device)


def _check_sizes(inputs: Inputs) -> None:
    clip, weight, bias = inputs.clip, inputs.weight, inputs.bias
    if min(weight.shape) < 1:
        _fail("weight", "have no size of 0", f"shape {tuple(weight.shape)}")
    if clip.shape[1] != weight.shape[1]:
        _fail("clip", f"have the {weight.shape[1]} channels of weight", clip.shape[1])
    for size, side, what in zip(
        clip.shape[2:], weight.shape[2:], ("frames", "height", "width"), strict=True
    ):
        if size < 1 or size % side:
            _fail("clip", f"have a multiple of {side} as its {what}", size)
    if bias is not None:
        if bias.shape[0] != weight.shape[0]:
            _fail("bias", f"have shape ({weight.shape[0]},)", tuple(bias.shape))
        if bias.dtype != weight.dtype:
            wanted = f"have the dtype of weight ({dtype_name(weight.dtype)})"
            _fail("bias", wanted, dtype_name(bias.dtype))
    wanted_shape = (2, clip.shape[1])
    if tuple(inputs.normalisation.shape) != wanted_shape:
        _fail("normalisation", f"have shape {wanted_shape}", tuple(inputs.normalisation.shape))
    if inputs.normalisation.dtype != inputs.accumulate_dtype:
        wanted = f"have dtype {dtype_name(inputs.accumulate_dtype)}"
        _fail("normalisation", wanted, dtype_name(inputs.normalisation.dtype))


def _check_ids(inputs: Inputs) -> None:
    ids, offsets, batch = inputs.ids, inputs.cu_seqlens, inputs.batch
    if offsets is not None:
        checks.has_rank(NAME, "ids", ids, 1, "[tokens] with cu_seqlens")
        sequences = offsets.shape[0] - 1
        if sequences < 0 or (sequences % batch if batch else sequences):
            wanted = f"have an offset more than a multiple of {batch} (clips)"
            _fail("cu_seqlens", wanted, offsets.shape[0])
        if sequences == 0 and ids.shape[0]:
            _fail("ids", "be empty without a sequence", tuple(ids.shape))
    elif ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != batch):
        _fail("ids", f"have shape (N,) or ({batch}, N) without cu_seqlens", tuple(ids.shape))


def check_direct(inputs: Inputs) -> None:
    """What the public function guarantees and a direct caller of torch.ops could get wrong."""
    if not inputs.weight.is_contiguous():
        _fail("weight", "be contiguous", f"strides {tuple(inputs.weight.stride())}")


def check_values(inputs: Inputs) -> None:
    """Ids lie in the grid, offsets cover the rows; read on a CPU, on a GPU only where asked for."""
    ids, offsets = inputs.ids, inputs.cu_seqlens
    if ids.numel() and checks.values_are_checked(ids):
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= inputs.tokens:
            _fail("ids", f"hold ids from 0 to {inputs.tokens - 1}", low if low < 0 else high)
    if offsets is not None:
        checks.offsets_valid(NAME, "cu_seqlens", offsets, ids.shape[0])
        if checks.values_are_checked(offsets) and int(offsets[-1]) != ids.shape[0]:
            _fail("cu_seqlens", f"end at the {ids.shape[0]} rows of ids", int(offsets[-1]))


def example(tokens: int) -> Callable[[str, torch.dtype], Inputs]:
    """Inputs of an ordinary call with `tokens` visible tokens of each of two clips, by device type
    and dtype."""

    def build(device_type: str, dtype: torch.dtype) -> Inputs:
        def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device_type)

        channels = _EXAMPLE_CLIP[1]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Inputs(
            zeros(*_EXAMPLE_CLIP, dtype=torch.uint8),
            zeros(192, channels, *_EXAMPLE_KERNEL),
            zeros(192),
            zeros(2, channels, dtype=wide),
            zeros(tokens, dtype=torch.int64),
            None,
        )

    return build


def _fail(argument: str, requirement: str, got: object) -> None:
    raise ValueError(checks.sentence(NAME, argument, requirement, got))
