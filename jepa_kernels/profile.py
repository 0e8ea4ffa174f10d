"""Where the time of your own code goes: a named range around every op of this package, a table per
op, a Chrome trace."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .backend import OPS, Backend
from .checks import sentence, type_name

# What a backend runs; `compose` is the traceable form of `torch` and `reference`, whose
# backward is ordinary autograd.
_PASSES = {"forward": "forward", "backward": "backward", "compose": "forward"}


@dataclass(frozen=True)
class Span:
    """One execution of one op. On a GPU `seconds` is time on the device's stream."""

    op: str
    pass_name: str
    backend: str
    shape: str
    device: str
    seconds: float


@dataclass
class _Open:
    op: str
    pass_name: str
    backend: str
    shape: str
    device: str
    start: Any
    stop: Any = None
    counts: bool = True


@dataclass
class Summary:
    """One line of the table."""

    op: str
    pass_name: str
    backend: str
    shape: str
    calls: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0


@dataclass
class profile:
    """Context manager: ranges around every op, for `torch.profiler`, Nsight (NVTX) and a table of
    its own.

    Args:
        trace: file for a Chrome / Perfetto trace of everything that ran inside, or None. Recording
            it slows the code down.
        nvtx: push NVTX ranges; None does so where CUDA is available.

    Attributes:
        spans: one entry per execution, in order of completion; complete after the context has
            ended.
        wall_s: seconds between entering and leaving.

    Raises:
        TypeError: `trace` is not a path. RuntimeError: the same object is entered twice.

    Notes:
        Ranges are called ``jepa_kernels::<op>.<forward|backward> [<backend>]``. They hold for every
        thread while the context is open, and backward passes appear whichever thread runs them. The
        backends `torch` and `reference` may run as plain PyTorch with its own autograd: then their
        forward has a range and their backward shows as PyTorch's own ops in the trace. Calls inside
        a region compiled by torch.compile are ranged where the op itself runs, not while tracing.

    Example:
        >>> import torch, jepa_kernels
        >>> x = torch.randn(1, 4, 2, 8)
        >>> with jepa_kernels.profile() as session:
        ...     _ = jepa_kernels.masked_attention(x, x, x)
        >>> session.spans[0].op
        'masked_attention'
    """

    trace: str | Path | None = None
    nvtx: bool | None = None
    spans: list[Span] = field(default_factory=list, init=False)
    wall_s: float = field(default=0.0, init=False)
    _open: list[_Open] = field(default_factory=list, init=False, repr=False)
    _stack: ExitStack | None = field(default=None, init=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False)
    _profiler: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.trace is not None and not isinstance(self.trace, (str, Path)):
            raise TypeError(
                sentence("profile", "trace", "be a path or None", type_name(self.trace))
            )
        if self.nvtx is None:
            self.nvtx = torch.cuda.is_available()

    def __enter__(self) -> profile:
        if self._stack is not None:
            raise RuntimeError(sentence("profile", "a session", "be entered once", "a second time"))
        self.spans.clear()
        self._stack = ExitStack()
        for op in OPS.values():
            for name, backend in list(op.backends.items()):
                op.backends[name] = self._ranged_backend(op.name, backend)
                self._stack.callback(op.backends.__setitem__, name, backend)
        if self.trace is not None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = self._stack.enter_context(
                torch.profiler.profile(activities=kinds, record_shapes=True)
            )
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if any(item.device == "cuda" for item in self._open):
            torch.cuda.synchronize()
        self.wall_s = time.perf_counter() - self._start
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
        if self._profiler is not None and self.trace is not None:
            Path(self.trace).parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.trace))
        with self._lock:
            for item in self._open:
                seconds = (
                    item.start.elapsed_time(item.stop) / 1e3
                    if item.device == "cuda"
                    else item.stop - item.start
                )
                self.spans.append(
                    Span(item.op, item.pass_name, item.backend, item.shape, item.device, seconds)
                )
            self._open.clear()

    def _ranged_backend(self, op: str, backend: Backend) -> Backend:
        """The same backend, its passes inside a range."""
        passes: dict[str, Any] = {
            name: self._ranged(op, _PASSES[name], backend.name, call)
            for name in _PASSES
            if (call := getattr(backend, name)) is not None
        }
        if backend.plain is not None:
            passes["plain"] = self._ranged_plain(op, backend.name, backend.plain)
        return replace(backend, **passes)

    def _ranged_plain(
        self, op: str, backend: str, plain: Callable[[Any], bool]
    ) -> Callable[[Any], bool]:
        """A call that a backend leaves to the usual way is not counted."""

        def run(inputs: Any) -> bool:
            with self._range(op, _PASSES["forward"], backend, inputs) as item:
                item.counts = plain(inputs)
            return item.counts

        return run

    def _ranged(
        self, op: str, pass_name: str, backend: str, call: Callable[..., Any]
    ) -> Callable[..., Any]:
        def run(inputs: Any, *more: Any) -> Any:
            if torch.compiler.is_compiling():
                return call(inputs, *more)
            with self._range(op, pass_name, backend, inputs):
                return call(inputs, *more)

        return run

    @contextmanager
    def _range(self, op: str, pass_name: str, backend: str, inputs: Any) -> Iterator[_Open]:
        signature = OPS[op].signature
        first = signature.given(signature.values(inputs))[0]
        device, shape = first.device.type, "x".join(map(str, first.shape))
        name = f"jepa_kernels::{op}.{pass_name} [{backend}]"
        on_gpu = device == "cuda"
        if self.nvtx and on_gpu:
            torch.cuda.nvtx.range_push(name)
        item = _Open(op, pass_name, backend, shape, device, _stamp(on_gpu))
        try:
            with torch.profiler.record_function(name):
                yield item
        finally:
            item.stop = _stamp(on_gpu)
            if self.nvtx and on_gpu:
                torch.cuda.nvtx.range_pop()
            if item.counts:
                with self._lock:
                    self._open.append(item)

    def summary(self, *, by_shape: bool = False) -> list[Summary]:
        """Totals per op, pass and backend (and shape of the first tensor), the most expensive
        first."""
        rows: dict[tuple[str, ...], Summary] = {}
        for span in self.spans:
            shape = span.shape if by_shape else ""
            row = rows.setdefault(
                (span.op, span.pass_name, span.backend, shape),
                Summary(span.op, span.pass_name, span.backend, shape),
            )
            row.calls += 1
            row.seconds += span.seconds
            row.slowest_s = max(row.slowest_s, span.seconds)
        return sorted(rows.values(), key=lambda row: -row.seconds)

    def table(self, *, by_shape: bool = False) -> str:
        """The summary as text, with each line's share of the whole context and what remains outside
        this package."""
        rows = self.summary(by_shape=by_shape)
        header = [
            "op",
            "pass",
            "backend",
            *(["shape"] if by_shape else []),
            "calls",
            "total ms",
            "mean ms",
            "slowest ms",
            "share",
        ]
        lines = [header]
        for row in rows:
            times = [
                f"{1e3 * row.seconds:.3f}",
                f"{1e3 * row.seconds / row.calls:.3f}",
                f"{1e3 * row.slowest_s:.3f}",
            ]
            where = [row.op, row.pass_name, row.backend, *([row.shape] if by_shape else [])]
            lines.append([*where, str(row.calls), *times, self._share(row.seconds)])
        outside = max(0.0, self.wall_s - sum(row.seconds for row in rows))
        gap = [""] * (len(header) - 5)
        lines.append(
            ["everything else", *gap, f"{1e3 * outside:.3f}", "", "", self._share(outside)]
        )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        left = len(header) - 5
        return "\n".join(
            "  ".join(
                text.ljust(width) if i < left else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )

    def _share(self, seconds: float) -> str:
        return f"{100 * seconds / self.wall_s:.1f} %" if self.wall_s > 0 else "-"


def _stamp(on_gpu: bool) -> Any:
    if on_gpu:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()
