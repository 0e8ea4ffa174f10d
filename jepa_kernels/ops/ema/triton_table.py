"""Lists of tensors as device tables for Triton kernels: one row of addresses for each tensor, one
entry for each chunk of elements.

Parameters stay where they are between steps, so tables are kept, keyed by every address and size in
them. A new one is uploaded without waiting. Importing this needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...device_tables import DeviceTables, upload

_tables = DeviceTables(64)


@dataclass(frozen=True)
class Table:
    """`rows` int64 [tensors, arrays + 2]: addresses (0 = absent), number of elements, stream.

    `chunks` int32 [chunks, 2]: a tensor and the number of a chunk within it.
    """

    rows: torch.Tensor
    chunks: torch.Tensor
    aligned: bool


def table(
    arrays: Sequence[Sequence[torch.Tensor | None]], streams: Sequence[int], block: int
) -> Table:
    """The table of `arrays` (one list for each column; None = absent) in chunks of `block`
    elements.

    Every entry is contiguous and has the elements of its first column, which is never absent.
    """
    first = arrays[0][0]
    assert first is not None
    device = first.device
    rows = tuple(
        (*(0 if t is None else t.data_ptr() for t in entry), entry[0].numel(), stream)
        for *entry, stream in zip(*arrays, streams, strict=True)
    )
    return Table(*_tables.get((device, block, rows), device, lambda: _build(rows, device, block)))


def _build(
    rows: tuple[tuple[int, ...], ...], device: torch.device, block: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    counts = [-(-row[-2] // block) for row in rows]
    tensors = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    places = torch.cat([torch.arange(count, dtype=torch.int32) for count in counts])
    chunks = torch.stack((tensors, places), dim=1).contiguous()
    aligned = all(address % 16 == 0 for row in rows for address in row[:-2])
    return upload(torch.tensor(rows, dtype=torch.int64), device), upload(chunks, device), aligned
