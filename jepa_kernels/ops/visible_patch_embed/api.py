"""The public function of visible_patch_embed."""

from __future__ import annotations

import torch

from ... import checks
from ...backend import resolve
from .contract import OP, Statistics, prepare
from .inputs import NAME


def visible_patch_embed(
    clip: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The patch embedding of the visible tubelets of clips: only these are read and multiplied.

    ``out[r] = W p(r) + bias``, with p(r) the pixels of tubelet r in the order of a Conv3d weight,
    each as ``(scale * x - mean[c]) / std[c]``: what a Conv3d with stride = kernel over the
    normalised clip gives at these places (the tubelet embedding of ViViT, arXiv 2103.15691, section
    3.2, as V-JEPA's encoders have it).

    Args:
        clip: ``[B, C, frames, height, width]``, any strides, so that ``video.permute(0, 4, 1, 2,
            3)`` of decoded ``[B, frames, height, width, C]`` is free; uint8, float32, bfloat16,
            float16 or float64, whatever the weight's dtype is. Sizes are multiples of the
            tubelet's. An image is a clip of one frame with pt = 1. Differentiated if it is float.
        weight: ``[D, C, pt, ph, pw]``, float32, bfloat16, float16 or float64, as of a Conv3d. Its
            dtype is that of products and of the output. Differentiated.
        bias: ``[D]`` in the dtype of weight, or None. Differentiated.
        ids: int32 or int64, ``t * H * W + y * W + x`` on the grid (T, H, W) of tubelets, from 0, in
            any order, repeated or not: ``[N]`` for every clip, ``[B, N]``, or packed ``[tokens]``
            with cu_seqlens. None takes all tokens in order.
        cu_seqlens: int32 or int64 ``[sequences + 1]``, where the sequences of packed ids begin and
            where the last ends. Sequence s reads clip s mod B, so that several mask sets of one
            batch lie one after another.
        mean, std: C numbers each, or tensors ``[C]`` on the clip's device (not differentiated);
            None is 0 and 1.
        scale: factor of a pixel ahead of them; None is 1/255 for uint8 clips and 1 for others.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Returns:
        ``[B, N, D]``, or packed ``[tokens, D]``, in the order of the ids and the dtype of weight.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value. Ids are
            read on a CPU; on a GPU only under JEPA_KERNELS_CHECK=1, and one outside the grid counts
            as the nearest inside.
        BackendUnsupportedError: the chosen backend cannot run this call; every reason is listed.

    Notes:
        Pixels are normalised in float32 while they are gathered, then rounded to the weight's
        dtype; products add up in float32 (float64 for float64). Backward gathers anew and keeps
        nothing but ids. No atomics: results of the kernels repeat bitwise. Double backward is not
        supported. Under autocast weight and bias take the autocast dtype, as in a linear layer; the
        clip stays what it is.

    Example:
        >>> import torch
        >>> from jepa_kernels import visible_patch_embed
        >>> conv = torch.nn.Conv3d(3, 32, (2, 16, 16), (2, 16, 16))
        >>> clip = torch.randint(0, 256, (2, 3, 4, 64, 64), dtype=torch.uint8)
        >>> ids = torch.tensor([0, 3, 17, 30])  # of a 2 x 4 x 4 grid
        >>> visible_patch_embed(clip, conv.weight, conv.bias, ids=ids).shape
        torch.Size([2, 4, 32])
    """
    checks.is_tensor(NAME, "clip", clip)
    weight, bias = checks.under_autocast(clip.device.type, weight, bias)
    inputs = prepare(
        clip, weight, bias, ids=ids, cu_seqlens=cu_seqlens, mean=mean, std=std, scale=scale
    )
    return OP.run(inputs, resolve(OP, inputs, backend))[0]
