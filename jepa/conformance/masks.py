"""The packed batch of a golden file, and the way between its per-set arrays and packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jepa.batch import MaskBatch
from jepa.conformance.golden import Golden


def read_masks(golden: Golden, grid: tuple[int, int, int], prefix: str = "") -> MaskBatch:
    """The MaskBatch of the arrays ``<prefix>mask_enc_j`` and ``<prefix>mask_pred_j``; without the
    latter it has no targets."""
    context, target = [], []
    for j in range(len(golden.names(f"{prefix}mask_enc_"))):
        context.append(list(golden[f"{prefix}mask_enc_{j}"]))
        key = f"{prefix}mask_pred_{j}"
        target.append(
            list(golden[key]) if key in golden else [np.zeros(0, dtype=np.int64)] * len(context[j])
        )
    return MaskBatch.from_ids(context, target, grid)


def pack(parts: list[Tensor]) -> Tensor:
    """[B, K_j, D] of every set as packed rows, set-major."""
    return torch.cat([part.flatten(0, 1) for part in parts])


def unpack(rows: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Packed rows as tensors of the shapes [B, K_j, D]."""
    pieces = rows.split([batch * tokens for batch, tokens, _ in shapes])
    return [piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)]
