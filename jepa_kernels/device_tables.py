"""Small tensors that are made once and kept on a device, for calls that a CUDA graph may record and
that may come from several streams."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

# Host memory that recorded copies read at every replay; nobody says when a graph is gone.
_read_by_graphs: list[torch.Tensor] = []
_Result = TypeVar("_Result", bound=tuple[Any, ...])


@dataclass(frozen=True)
class _Entry:
    result: Any
    stream: torch.cuda.Stream | None = None  # where they were made; None on a CPU
    made: torch.cuda.Event | None = None


class DeviceTables:
    """The last `most` results of `get`, by key: tuples of tensors, and of what is known of them.

    A result that is made while the current stream is captured exists when the graph runs, and in
    its memory: it is handed out and not kept. A kept one that a captured call takes is never
    forgotten, since replays read it.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._read_by_graphs: dict[Hashable, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forgets what no graph reads."""
        self._entries.clear()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], _Result]) -> _Result:
        """The result of `key` on `device`, made by `make` if it is not kept."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        entry = self._entries.get(key) or self._read_by_graphs.get(key)
        if entry is None:
            made = make()
            if not capturing:
                self._keep(key, _made_now(made, device))
            return made
        result: _Result = entry.result
        if capturing:
            self._read_by_graphs[key] = entry
            return result
        if key in self._entries:
            self._entries.move_to_end(key)
        else:
            self._keep(key, entry)
        if entry.stream is not None:
            _order(entry, torch.cuda.current_stream(device))
        return result

    def _keep(self, key: Hashable, entry: _Entry) -> None:
        self._entries[key] = entry
        self._entries.move_to_end(key)
        if len(self._entries) > self.most:
            self._entries.popitem(last=False)


def _made_now(result: tuple[Any, ...], device: torch.device) -> _Entry:
    if device.type != "cuda":
        return _Entry(result)
    stream = torch.cuda.current_stream(device)
    return _Entry(result, stream, stream.record_event())


def _order(entry: _Entry, stream: torch.cuda.Stream) -> None:
    """Work on `stream` comes after the making, and the memory outlives it."""
    if stream == entry.stream or entry.made is None:
        return
    stream.wait_event(entry.made)
    for item in entry.result:
        if isinstance(item, torch.Tensor):
            item.record_stream(stream)


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host` on `device`: from a CPU to a GPU by a copy of pinned memory, which waits for nothing
    and which a CUDA graph can record."""
    if device.type != "cuda" or host.device.type != "cpu":
        return host.to(device)
    pinned = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _read_by_graphs.append(pinned)
    return pinned.to(device, non_blocking=True)
