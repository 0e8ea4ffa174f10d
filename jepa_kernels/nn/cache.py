"""Keys and values of a context that grows, for decoders and planners that append a frame at a
time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import checks
from ..ops.masked_attention import masked_attention
from ..rope3d import Rope3D

_NAME = "KeyValueCache"


@dataclass
class _Segment:
    """Tokens that `shared` consecutive sequences of the cache have in common: keys and values
    ``[B / shared, capacity, heads, head_dim]`` of which the first `length` are in use."""

    key: torch.Tensor
    value: torch.Tensor
    ids: torch.Tensor | None
    times: torch.Tensor | None
    length: int
    shared: int = 1

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The keys, values and times in use."""
        times = None if self.times is None else self.times[: self.length]
        return self.key[:, : self.length], self.value[:, : self.length], times


class KeyValueCache:
    """Keys and values of the tokens so far: `append` adds tokens, `attend` pays for new queries
    alone. One for each attention layer; for inference, without gradients.

    Keys are kept rotated, which is exact as long as positions go on from where they were. A window
    that slides and counts its positions from 0 again (as in jepa-wms) needs its keys rotated anew:
    `append` refuses it.

    Args:
        rope: positions of the tokens, or None for attention without positions.

    Example:
        >>> import torch
        >>> from jepa_kernels import Rope3D, frame_times
        >>> cache = KeyValueCache(Rope3D((8, 2, 2)))
        >>> ids = torch.arange(4)  # the first frame
        >>> q, k, v = torch.randn(3, 1, 4, 2, 24)
        >>> cache.append(k, v, ids=ids, times=frame_times((8, 2, 2), ids))
        >>> cache.attend(q, ids=ids, times=frame_times((8, 2, 2), ids)).shape
        torch.Size([1, 4, 2, 24])
        >>> cache.fork(3).batch  # three futures of the same past, which is kept once
        3
    """

    def __init__(self, rope: Rope3D | None = None) -> None:
        if rope is not None and not isinstance(rope, Rope3D):
            raise TypeError(
                checks.sentence(_NAME, "rope", "be a Rope3D or None", checks.type_name(rope))
            )
        self.rope = rope
        self.batch = 0  # sequences; 0 until the first append
        self._segments: list[_Segment] = []
        self._grows = False  # whether the last segment is this cache's own
        self._lent = 0  # tokens at its start that forks may still read

    def __len__(self) -> int:
        """Tokens of each sequence."""
        return sum(segment.length for segment in self._segments)

    def append(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
    ) -> None:
        """Adds tokens at the end of every sequence.

        Args:
            key, value: ``[B, n, heads, head_dim]``; `key` not rotated. Copied.
            ids: int32 or int64 ``[n]``; required with `rope`, None without.
            times: int32 or int64 ``[n]``; given at every append or at none.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or device, other tokens than
                the cache holds, tensors that need gradients, or positions that restart.
        """
        self._check(key, value, ids, times)
        if self.rope is not None:
            assert ids is not None
            self._check_positions(ids)
            key = self.rope.rotate(key, ids)
        count = key.shape[1]
        last = self._growing(key, value, ids, times, count)
        at = slice(last.length, last.length + count)
        for buffer, new in ((last.key, key), (last.value, value)):
            buffer[:, at] = new
        for numbers, more in ((last.ids, ids), (last.times, times)):
            if numbers is not None:
                assert more is not None
                numbers[at] = more
        last.length += count

    def attend(
        self,
        query: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        window: int | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Attention of new queries to all tokens of the cache that they see; append the queries'
        own tokens first.

        Args:
            query: ``[B, n, heads, head_dim]``, not rotated.
            ids, times: int32 or int64 ``[n]``, as for `append`.
            window, scale, backend: as in `masked_attention`.

        Returns:
            out, shaped like `query`. A past that forks share is read once for all of them, and the
            parts are joined by their log-sum-exp.
        """
        self._check(query, query, ids, times)
        parts = [
            self._attend_to(segment, query, ids, times, window, scale, backend)
            for segment in self._segments
            if segment.length
        ]
        return parts[0][0] if len(parts) == 1 else _joined(parts, query)

    def truncate(self, length: int) -> None:
        """Forgets all tokens but the first `length`."""
        if not 0 <= length <= len(self):
            wanted = f"be from 0 to the {len(self)} tokens of the cache"
            raise ValueError(checks.sentence(_NAME, "length", wanted, length))
        for segment in self._segments:
            segment.length = min(segment.length, length)
            length -= segment.length

    def fork(self, copies: int) -> KeyValueCache:
        """A cache of ``B * copies`` sequences, `copies` continuations of each sequence side by
        side, that shares the tokens so far with this one without copying them."""
        if copies < 1:
            raise ValueError(checks.sentence(_NAME, "copies", "be at least 1", copies))
        child = KeyValueCache(self.rope)
        child.batch = self.batch * copies
        child._segments = [replace(s, shared=s.shared * copies) for s in self._segments if s.length]
        if self._grows:
            self._lent = max(self._lent, self._segments[-1].length)
        return child

    def _check(
        self,
        rows: torch.Tensor,
        value: torch.Tensor,
        ids: torch.Tensor | None,
        times: torch.Tensor | None,
    ) -> None:
        for argument, tensor in (("key or query", rows), ("value", value)):
            checks.is_tensor(_NAME, argument, tensor)
            checks.has_rank(_NAME, argument, tensor, 4, "[B, n, heads, head_dim]")
            if tensor.requires_grad and torch.is_grad_enabled():
                hint = "Use torch.no_grad(), or masked_attention over the whole context."
                wanted = "need no gradient"
                raise ValueError(checks.sentence(_NAME, argument, wanted, "one that does", hint))
        if value.shape != rows.shape:
            wanted = f"have the shape of key {tuple(rows.shape)}"
            raise ValueError(checks.sentence(_NAME, "value", wanted, tuple(value.shape)))
        if self._segments:
            kept = self._segments[-1].key
            wanted_rows = (self.batch, *kept.shape[2:], kept.dtype, kept.device)
            if (rows.shape[0], *rows.shape[2:], rows.dtype, rows.device) != wanted_rows:
                wanted = f"have B, heads, head_dim, dtype and device {wanted_rows} of the cache"
                got = (rows.shape[0], *rows.shape[2:], rows.dtype, rows.device)
                raise ValueError(checks.sentence(_NAME, "key or query", wanted, got))
        timed = bool(self._segments) and self._segments[-1].times is not None
        for argument, numbers, required in (
            ("ids", ids, self.rope is not None),
            ("times", times, timed if self._segments else times is not None),
        ):
            if (numbers is not None) != required:
                wanted = "be given, as for the cache" if required else "be None, as for the cache"
                state = "None" if numbers is None else "a tensor"
                raise ValueError(checks.sentence(_NAME, argument, wanted, state))
            if numbers is None:
                continue
            checks.is_tensor(_NAME, argument, numbers)
            checks.has_dtype(_NAME, argument, numbers, checks.ID_DTYPES)
            checks.same_device(_NAME, argument, numbers, rows.device)
            if tuple(numbers.shape) != (rows.shape[1],):
                wanted = f"have shape {(rows.shape[1],)}"
                raise ValueError(checks.sentence(_NAME, argument, wanted, tuple(numbers.shape)))

    def _check_positions(self, ids: torch.Tensor) -> None:
        """Frames go on from those of the cache; read where reading waits for nothing."""
        assert self.rope is not None
        frames, height, width = self.rope.grid
        checks.token_ids_in_grid(_NAME, "ids", ids, frames * height * width)
        if not checks.values_are_checked(ids):
            return
        known = [s.ids[: s.length] for s in self._segments if s.ids is not None and s.length]
        latest = max((int(k.max()) for k in known), default=-1) // (height * width)
        placed = ids[ids >= 0]
        if placed.numel() and int(placed.min()) // (height * width) < latest:
            got = f"frame {int(placed.min()) // (height * width)}"
            wanted = f"go on from frame {latest}, which the cache holds"
            hint = "Keys are kept rotated: where positions restart, fill a new cache."
            raise ValueError(checks.sentence(_NAME, "ids", wanted, got, hint))

    def _growing(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        ids: torch.Tensor | None,
        times: torch.Tensor | None,
        count: int,
    ) -> _Segment:
        """The last segment, with room for `count` more tokens that nobody else reads."""
        if not self._grows:
            keys, values = (t.new_empty((t.shape[0], count, *t.shape[2:])) for t in (key, value))
            own_ids, own_times = (
                None if t is None else t.new_empty(count, dtype=torch.int64) for t in (ids, times)
            )
            last = _Segment(keys, values, own_ids, own_times, 0)
            self._segments.append(last)
            self.batch, self._grows, self._lent = key.shape[0], True, 0
        last = self._segments[-1]
        if last.length < self._lent or last.length + count > last.key.shape[1]:
            capacity = max(2 * last.length, last.length + count)
            last.key, last.value = (
                _grown(t, 1, last.length, capacity) for t in (last.key, last.value)
            )
            last.ids, last.times = (
                None if t is None else _grown(t, 0, last.length, capacity)
                for t in (last.ids, last.times)
            )
            self._lent = 0
        return last

    def _attend_to(
        self,
        segment: _Segment,
        query: torch.Tensor,
        ids: torch.Tensor | None,
        times: torch.Tensor | None,
        window: int | None,
        scale: float | None,
        backend: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse over one segment: the queries of all sequences that share it are those of one
        sequence."""
        key, value, key_times = segment.tensors()
        batch, count, heads, head_dim = query.shape
        shared = segment.shared
        folded = query.reshape(batch // shared, shared * count, heads, head_dim)
        options = {
            name: None if t is None else t.repeat(shared)
            for name, t in (("query_ids", ids), ("query_times", times))
        }
        out, lse = masked_attention(
            folded,
            key,
            value,
            **options,
            key_times=key_times,
            window=window,
            rope=self.rope,
            keys_rotated=self.rope is not None,
            scale=scale,
            return_lse=True,
            backend=backend,
        )
        lse = lse.unflatten(-1, (shared, count)).movedim(-2, 1).reshape(batch, heads, count)
        return out.view(query.shape), lse


def _grown(buffer: torch.Tensor, dim: int, length: int, capacity: int) -> torch.Tensor:
    """A copy of the first `length` entries with room for `capacity`."""
    shape = list(buffer.shape)
    shape[dim] = capacity
    grown = buffer.new_empty(shape)
    grown.narrow(dim, 0, length).copy_(buffer.narrow(dim, 0, length))
    return grown


def _joined(parts: list[tuple[torch.Tensor, torch.Tensor]], query: torch.Tensor) -> torch.Tensor:
    """Attention over all parts from the out and lse of each; 0 where a query sees nothing."""
    if not parts:
        return torch.zeros_like(query)
    lse = torch.stack([lse for _, lse in parts])
    largest = lse.amax(0).clamp(min=torch.finfo(lse.dtype).min)
    weights = (lse - largest).exp()
    weights = weights / weights.sum(0).clamp(min=torch.finfo(lse.dtype).tiny)
    weighed: list[torch.Tensor] = [
        w.movedim(1, 2)[..., None] * out.to(w.dtype)
        for w, (out, _) in zip(weights, parts, strict=True)
    ]
    return sum(weighed[1:], start=weighed[0]).to(query.dtype)
