"""Clips and the token lists of their masks, packed so that no step needs a loop or a look-up on the
host: as a loader reads them (`LoadedBatch`) and as a training step takes them (`Batch`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa import host, lattice


@dataclass(frozen=True)
class TensorRecord:
    """A dataclass of tensors, of other such records and of plain values, that moves as a whole."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy whose tensors are on `device`."""
        return self._mapped(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy whose tensors are in page-locked memory."""
        return self._mapped(lambda value: value.pin_memory())

    def _mapped(self, change: Callable[[Any], Any]) -> Self:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(
            **{
                name: change(value) if isinstance(value, Tensor | TensorRecord) else value
                for name, value in values.items()
            }
        )


@dataclass(frozen=True)
class MaskBatch(TensorRecord):
    """Context and target tokens of J mask sets over B samples, packed set-major: sequence s = j*B +
    b.

    A token id is t*H*W + y*W + x on the grid (T, H, W), N = T*H*W; `*_rows` are b*N + id, rows of a
    dense [B*N, D]; `*_cu` are the cumulative lengths of the J*B sequences. Pairs and columns list
    sites of the *context* that exist at several time steps.
    """

    num_sets: int
    batch_size: int
    grid: tuple[int, int, int]
    context_ids: Tensor  # int64 [Nc]
    context_cu: Tensor  # int32 [J*B+1]
    context_set: Tensor  # int64 [Nc]
    context_rows: Tensor  # int64 [Nc]
    target_ids: Tensor  # int64 [Nt]
    target_cu: Tensor  # int32 [J*B+1]
    target_set: Tensor  # int64 [Nt]
    target_rows: Tensor  # int64 [Nt]
    # float32 [Nc]: sqrt of the Euclidean distance to the nearest target token of the sequence
    context_distance: Tensor
    pairs: Tensor  # int64 [P, K+1]: packed context rows of one site at t, t+1, .. t+K
    pair_rows: Tensor  # int64 [P, K+1]
    pair_set: Tensor  # int64 [P]
    columns: Tensor  # int64 [C, T]: packed context rows of a site that is present at all T steps
    column_rows: Tensor  # int64 [C, T]
    column_set: Tensor  # int64 [C]
    context_count: Tensor  # float32 [J]
    target_count: Tensor  # float32 [J]
    pair_count: Tensor  # float32 [J]
    column_count: Tensor  # float32 [J]
    context_sizes: tuple[
        int, ...
    ]  # Nc of each set, known on the host: set j is a slice of the packed context

    @property
    def horizon(self) -> int:
        """K: a pair row holds K+1 consecutive time steps."""
        return self.pairs.shape[1] - 1

    @property
    def num_tokens(self) -> int:
        """N = T*H*W."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @classmethod
    def from_ids(
        cls,
        context: Sequence[Sequence[NDArray[np.int64]]],
        target: Sequence[Sequence[NDArray[np.int64]]],
        grid: tuple[int, int, int],
        horizon: int = 1,
        backend: str = "auto",
    ) -> Self:
        """Packs per-set, per-sample id arrays and derives every list from them.

        Args:
            context: J lists of B integer arrays of distinct ids, in any order (the packed order is
                the given one); may be empty arrays.
            target: the same layout; disjoint from the context of the same sequence.
            grid: (T, H, W) in tokens.
            horizon: K >= 1, the number of steps a pair spans.
            backend: "auto" (C++ host code where built), "host" or "numpy"; the lists are the same.

        Returns:
            A MaskBatch on the CPU. A sequence without targets has infinite context distances
            (weight 1/distance = 0).

        Raises:
            ValueError: lists of unequal size, ids out of range, repeated ids, or a token that is
                both context and target.
        """
        num_sets, batch_size = len(context), len(context[0]) if context else 0
        grid = _checked_grid(grid)
        num_tokens = grid[0] * grid[1] * grid[2]
        if horizon < 1:
            raise ValueError(f"MaskBatch.from_ids: horizon must be at least 1, got {horizon}.")
        context_ids, context_cu, context_seq = _packed(
            "context", context, num_sets, batch_size, num_tokens
        )
        target_ids, target_cu, target_seq = _packed(
            "target", target, num_sets, batch_size, num_tokens
        )

        num_sequences = num_sets * batch_size
        context_table = _distinct_table(
            "context", context_ids, context_seq, num_sequences, num_tokens
        )
        target_table = _distinct_table("target", target_ids, target_seq, num_sequences, num_tokens)
        shared = (context_table >= 0) & (target_table >= 0)
        if shared.any():
            sequence, token = (int(v) for v in np.argwhere(shared)[0])
            raise ValueError(
                "MaskBatch.from_ids: target must not share tokens with the context of its "
                f"sequence, got token {token} in both "
                f"(set {sequence // batch_size}, sample {sequence % batch_size})."
            )
        module = host.resolve(backend)
        if module is None:
            distance = lattice.nearest_distance(target_table, context_ids, context_seq, grid)
            pairs, pair_ids, pair_seq = lattice.temporal_pairs(context_table, grid, horizon)
            columns, column_ids, column_seq = lattice.full_columns(context_table, grid)
        else:
            distance, (pairs, pair_ids, pair_seq), (columns, column_ids, column_seq) = (
                module.mask_lists(context_ids, context_cu, target_ids, target_cu, grid, horizon)
            )

        def rows(ids: NDArray[np.int64], sequence: NDArray[np.int64]) -> Tensor:
            sample = sequence % batch_size
            return torch.from_numpy(sample.reshape(-1, *[1] * (ids.ndim - 1)) * num_tokens + ids)

        def sets(sequence: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(sequence // batch_size)

        def counts(sequence: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(
                np.bincount(sequence // batch_size, minlength=num_sets).astype(np.float32)
            )

        return cls(
            num_sets=num_sets,
            batch_size=batch_size,
            grid=grid,
            context_ids=torch.from_numpy(context_ids),
            context_cu=torch.from_numpy(context_cu),
            context_set=sets(context_seq),
            context_rows=rows(context_ids, context_seq),
            target_ids=torch.from_numpy(target_ids),
            target_cu=torch.from_numpy(target_cu),
            target_set=sets(target_seq),
            target_rows=rows(target_ids, target_seq),
            context_distance=torch.from_numpy(distance),
            pairs=torch.from_numpy(pairs),
            pair_rows=rows(pair_ids, pair_seq),
            pair_set=sets(pair_seq),
            columns=torch.from_numpy(columns),
            column_rows=rows(column_ids, column_seq),
            column_set=sets(column_seq),
            context_count=counts(context_seq),
            target_count=counts(target_seq),
            pair_count=counts(pair_seq),
            column_count=counts(column_seq),
            context_sizes=tuple(
                int(n) for n in np.bincount(context_seq // batch_size, minlength=num_sets)
            ),
        )


@dataclass(frozen=True)
class Views(TensorRecord):
    """The part of each clip that a step sees, in shares of the frame, and whether it is mirrored.
    Cut out on the device: data/transforms.py."""

    boxes: Tensor  # float32 [B, 4]: top, left, height, width
    flips: Tensor  # bool [B]


@dataclass(frozen=True)
class LoadedBatch(TensorRecord):
    """What a loader reads: bytes as decoded, with the part of each clip that the model will see."""

    clips: Tensor  # uint8 [B, frames, H, W, 3]
    labels: Tensor  # int64 [B]
    sample_ids: Tensor  # int64 [B]
    masks: MaskBatch | None  # None where the loader samples none
    views: Views | None  # None: the whole frame

    def for_step(self, clips: Tensor, step: int) -> Batch:
        """What optimiser step `step` takes, once `clips` have been normalised.

        Raises:
            ValueError: the loader samples no masks.
        """
        if self.masks is None:
            raise ValueError("LoadedBatch: masks must be given for a training step, got None.")
        return Batch(clips, self.masks, step)


@dataclass(frozen=True)
class Batch(TensorRecord):
    """What a training step takes: normalised clips and the masks of every one of them.

    `step` is the optimiser step that takes it, counted from 0. Micro-batches of one optimiser step
    share it.

    Raises:
        ValueError: clips of another layout, such as a loader's bytes.
    """

    clips: Tensor  # float [B, 3, frames, H, W]
    masks: MaskBatch
    step: int

    def __post_init__(self) -> None:
        clips = self.clips
        if not clips.is_floating_point() or clips.ndim != 5 or clips.shape[1] != 3:
            raise ValueError(
                f"Batch: clips must be float [B, 3, frames, H, W], got {clips.dtype} "
                f"{list(clips.shape)}."
            )


def _checked_grid(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(grid) != 3 or min(grid) < 1 or max(grid) > lattice.LONGEST_SIDE:
        raise ValueError(
            "MaskBatch.from_ids: grid must be three numbers (T, H, W) from 1 to "
            f"{lattice.LONGEST_SIDE}, got {tuple(grid)}."
        )
    return int(grid[0]), int(grid[1]), int(grid[2])


def _packed(
    name: str,
    ids: Sequence[Sequence[NDArray[np.int64]]],
    num_sets: int,
    batch_size: int,
    num_tokens: int,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Ids in packed order, cumulative lengths, and the sequence of each id."""
    if (
        num_sets < 1
        or batch_size < 1
        or len(ids) != num_sets
        or any(len(samples) != batch_size for samples in ids)
    ):
        sizes = [len(samples) for samples in ids]
        raise ValueError(
            f"MaskBatch.from_ids: {name} must hold {num_sets} mask sets of {batch_size} samples "
            f"(at least one), got {sizes}."
        )
    flat = [np.asarray(one) for samples in ids for one in samples]
    if any(one.ndim != 1 or (one.size and one.dtype.kind not in "iu") for one in flat):
        kinds = sorted({f"{one.dtype}[{one.ndim}-d]" for one in flat})
        raise ValueError(
            f"MaskBatch.from_ids: {name} must hold one-dimensional integer arrays, got "
            f"{', '.join(kinds)}."
        )
    lengths = np.array([one.size for one in flat], dtype=np.int64)
    packed = np.concatenate([one.astype(np.int64) for one in flat])
    if packed.size and (packed.min() < 0 or packed.max() >= num_tokens):
        raise ValueError(
            f"MaskBatch.from_ids: {name} ids must lie in [0, {num_tokens}), got {packed.min()} to "
            f"{packed.max()}."
        )
    cumulative = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return packed, cumulative, np.repeat(np.arange(len(flat), dtype=np.int64), lengths)


def _distinct_table(
    name: str,
    ids: NDArray[np.int64],
    sequence: NDArray[np.int64],
    num_sequences: int,
    num_tokens: int,
) -> NDArray[np.int64]:
    table = lattice.presence_table(ids, sequence, num_sequences, num_tokens)
    if np.count_nonzero(table >= 0) != ids.size:
        raise ValueError(
            f"MaskBatch.from_ids: {name} ids must be distinct within a sequence, got a repeated id."
        )
    return table
