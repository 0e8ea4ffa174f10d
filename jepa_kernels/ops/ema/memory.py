"""Lists of tensors as flat arrays in one memory order, which is what the kernels walk. Strided
tensors cost a copy; dense ones do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from ...checks import sentence

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Inputs = TypeVar("_Inputs", bound="DataclassInstance")
Lists = tuple[Sequence[torch.Tensor], ...]


def unique(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> list[int] | None:
    """Places of the first occurrence of every tensor with elements, or None when that is all of
    them. A tied tensor is one tensor.

    Raises:
        ValueError: one target occurs with two sources.
    """
    addresses = list(map(torch.Tensor.data_ptr, targets))
    distinct = set(addresses)
    if len(distinct) == len(addresses) and 0 not in distinct:
        return None
    seen: dict[tuple[int, torch.Size], int] = {}
    kept = []
    for i, target in enumerate(targets):
        if target.numel() == 0:
            continue
        first = seen.setdefault((addresses[i], target.shape), i)
        if first == i:
            kept.append(i)
        elif sources[i].data_ptr() != sources[first].data_ptr():
            raise ValueError(
                sentence(
                    "ema_update_",
                    f"targets[{i}]",
                    f"have the source of targets[{first}], which is the same tensor",
                    "another one",
                )
            )
    return kept


class Flat:
    """`lists` as arrays whose elements have one order: ``with Flat(written, read, ...) as (written,
    read): kernel(...)``.

    Entry i of every list must have the same shape (or no elements). Where the entries are dense
    with one permutation of axes they are viewed; otherwise they are copied, and those of `written`
    lists are copied back at the end.
    """

    def __init__(self, *, written: Lists, read: Lists, row_major: bool) -> None:
        self.lists = [list(values) for values in (*written, *read)]
        self.num_written = len(written)
        self.row_major = row_major
        self.back: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> list[list[torch.Tensor]]:
        if all(all(map(torch.Tensor.is_contiguous, values)) for values in self.lists):
            return self.lists
        for i in range(len(self.lists[0])):
            self._flatten(i)
        return self.lists

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            for original, flat in self.back:
                original.copy_(flat)

    def _flatten(self, i: int) -> None:
        entries = [
            (place, values[i])
            for place, values in enumerate(self.lists)
            if i < len(values) and values[i].numel()
        ]
        if all(tensor.is_contiguous() for _, tensor in entries):
            return
        first = entries[0][1]
        order = sorted(range(first.dim()), key=first.stride, reverse=True)
        if not self.row_major and all(
            t.dim() == first.dim() and t.permute(order).is_contiguous() for _, t in entries
        ):
            for place, tensor in entries:
                self.lists[place][i] = tensor.permute(order)
            return
        for place, tensor in entries:
            flat = tensor.contiguous()
            self.lists[place][i] = flat
            if place < self.num_written and flat is not tensor:
                self.back.append((tensor, flat))


class FlatInputs(Generic[_Inputs]):
    """The inputs of a call with some of their lists as `Flat` gives them."""

    def __init__(
        self, inputs: _Inputs, *, written: tuple[str, ...], read: tuple[str, ...], row_major: bool
    ) -> None:
        self.inputs, self.names = inputs, (*written, *read)
        self.flat = Flat(
            written=tuple(getattr(inputs, name) for name in written),
            read=tuple(getattr(inputs, name) for name in read),
            row_major=row_major,
        )

    def __enter__(self) -> _Inputs:
        lists: dict[str, Any] = dict(zip(self.names, self.flat.__enter__(), strict=True))
        return replace(self.inputs, **lists)

    def __exit__(self, *exception: Any) -> None:
        self.flat.__exit__(*exception)
