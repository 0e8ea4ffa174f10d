"""The packed batch of a golden file, and the way between its per-set arrays and packed rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jepa.batch import MaskBatch
from jepa.conformance.report import Golden


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


def unpack(rows: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """Packed rows as tensors of the shapes of `parts`."""
    pieces = rows.split([part.shape[0] * part.shape[1] for part in parts])
    return [
        piece.view(part.shape[0], part.shape[1], -1)
        for piece, part in zip(pieces, parts, strict=True)
    ]
