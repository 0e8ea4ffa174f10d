"""Which implementation runs: names, precedence, refusal. The only dispatch code of the package.

Precedence: the `backend=` argument, then the innermost `use_backend`, then JEPA_KERNELS_BACKEND
(read once, at import), then `auto`. A backend chosen by name never falls back: it runs or raises
`BackendUnsupportedError` with every reason.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch

from . import transforms

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
CHOICES = ("auto", *BACKENDS)


class BackendUnsupportedError(NotImplementedError):
    """A valid call that the chosen backend, or every backend, cannot run here. The message lists
    each reason."""


class Call(Protocol):
    """What backends may look at to decide: shapes, dtypes, devices and flags, never values."""

    @property
    def device_type(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def describe(self) -> str:
        """The call on one line, for refusals and `explain`."""
        ...

    def size_class(self) -> str:
        """The row of the preference table that this call belongs to, such as ``short`` or
        ``long``."""
        ...


def _validated(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(
            f"jepa_kernels: {source} must be one of {', '.join(CHOICES)}, got {name!r}."
        )
    return name


_environment = _validated(os.environ.get("JEPA_KERNELS_BACKEND", "auto"), "JEPA_KERNELS_BACKEND")


class _Overrides(threading.local):
    # A thread-local stack rather than a ContextVar: Dynamo traces the former.
    def __init__(self) -> None:
        self.stack: list[str] = []


_overrides = _Overrides()


class use_backend:
    """Context manager: every op called inside runs on `name`, or raises. Enter it outside a
    compiled region.

    Example:
        >>> import torch, jepa_kernels
        >>> x = torch.randn(1, 4, 2, 8)
        >>> with jepa_kernels.use_backend("torch"):
        ...     jepa_kernels.masked_attention(x, x, x).shape
        torch.Size([1, 4, 2, 8])
    """

    def __init__(self, name: str) -> None:
        self.name = _validated(name, "use_backend name")

    def __enter__(self) -> use_backend:
        _overrides.stack.append(self.name)
        return self

    def __exit__(self, *exception: object) -> None:
        _overrides.stack.pop()


def requested(backend: str | None) -> tuple[str, str]:
    """The name in force and where it came from."""
    if backend is not None:
        return _validated(backend, "backend"), "forced by the backend argument"
    if _overrides.stack:
        return _overrides.stack[-1], "forced by use_backend"
    return _environment, "forced by JEPA_KERNELS_BACKEND"


@dataclass(frozen=True)
class Preference:
    """A measured case in which `auto` passes a backend by, with the committed record that shows
    why."""

    backend: str
    device_type: str
    dtype: torch.dtype
    size_class: str
    reason: str
    record: str
    isa: str | None = None  # CPU only: the instruction set on which it was measured


@dataclass(frozen=True)
class Room:
    """One op: its name, its backends in the order `auto` tries them, and how to read a call.

    A backend is the module ``jepa_kernels.ops.<name>.<backend>`` with
    ``unsupported_reasons(call)``, ``forward`` and ``backward``. `prepare` checks arguments as the
    public function does and describes the call; `example` describes a small ordinary call on a
    device kind and dtype, for the support table and for `doctor`.
    """

    name: str
    priority: tuple[str, ...]
    prepare: Callable[..., Call]
    example: Callable[[str, torch.dtype], Call]
    preferences: tuple[Preference, ...] = ()
    modules: dict[str, ModuleType] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for backend in self.priority:
            self.modules[backend] = importlib.import_module(
                f"jepa_kernels.ops.{self.name}.{backend}"
            )
        ROOMS[self.name] = self

    def reasons(self, backend: str, call: Call) -> list[str]:
        """Why `backend` cannot run `call`; empty when it can."""
        if backend not in self.modules:
            return [f"{self.name} has no {backend} backend"]
        obstacle = transforms.obstacle(self.name, backend)
        reasons = self.modules[backend].unsupported_reasons(call)
        return reasons if obstacle is None else [obstacle, *reasons]

    def slower(self, backend: str, call: Any) -> Preference | None:
        """The committed measurement that makes `auto` pass `backend` by for this call, if there is
        one."""
        if not self.preferences:
            return None
        from . import native

        for preference in self.preferences:
            if (
                preference.backend == backend
                and preference.device_type == call.device_type
                and preference.dtype == call.dtype
                and preference.size_class in ("any", call.size_class())
                and preference.isa in (None, native.isa_name())
            ):
                return preference
        return None


ROOMS: dict[str, Room] = {}
_warned: set[str] = set()


def resolve(room: Room, call: Call, backend: str | None = None) -> str:
    """The backend that will run `call`.

    Raises:
        ValueError: `backend` is not a backend name.
        BackendUnsupportedError: the chosen backend (or, for ``auto``, every backend) cannot run the
            call.
    """
    name, source = requested(backend)
    if name != "auto":
        reasons = room.reasons(name, call)
        if reasons:
            raise BackendUnsupportedError(_refusal(room, call, {name: reasons}, name, source))
        return name
    refused: dict[str, list[str]] = {}
    for candidate in room.priority:
        reasons = room.reasons(candidate, call)
        if not reasons and room.slower(candidate, call) is None:
            if candidate == "torch" and call.device_type == "cuda":
                _warn_slow(room, refused)
            return candidate
        refused[candidate] = reasons
    raise BackendUnsupportedError(_refusal(room, call, refused, "auto", source))


def _warn_slow(room: Room, refused: dict[str, list[str]]) -> None:
    if torch.compiler.is_compiling() or room.name in _warned:
        return
    _warned.add(room.name)
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items() if reasons)
    warnings.warn(
        f"{room.name} runs on the torch backend on this GPU. {why}", RuntimeWarning, stacklevel=4
    )


def _refusal(room: Room, call: Call, refused: dict[str, list[str]], name: str, source: str) -> str:
    if name == "auto":
        head = f"{room.name} cannot run on any backend."
    else:
        head = f"{room.name} cannot run on backend '{name}' ({source})."
    lines = [head, f"  call    {call.describe()}"]
    for backend, reasons in refused.items():
        for i, reason in enumerate(reasons):
            lines.append(f"  {backend if i == 0 else '':7s} {reason}")
    others = [b for b in room.priority if b not in refused and not room.reasons(b, call)]
    if others:
        lines.append("  try     " + ", ".join(f'backend="{b}"' for b in (*others, "auto")))
    return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """A table of which backend would run this call and why each other one would not; nothing is
    computed.

    Args:
        op: name of an op, such as ``"masked_attention"``.
        *args, **kwargs: what the op itself would be given.

    Returns:
        The table as text, one line per backend.

    Raises:
        ValueError: `op` is not the name of an op. TypeError and ValueError of the op itself for a
            bad call.
    """
    if op not in ROOMS:
        raise ValueError(f"explain: op must be one of {', '.join(ROOMS)}, got {op!r}.")
    room = ROOMS[op]
    backend = kwargs.pop("backend", None)
    call = room.prepare(*args, **kwargs)
    name, source = requested(backend)
    lines = [f"{op}  {call.describe()}"]
    chosen = None
    for candidate in room.priority:
        reasons = room.reasons(candidate, call)
        slower = room.slower(candidate, call) if not reasons else None
        if reasons:
            lines.append(f"  {candidate:10s} no     {'; '.join(reasons)}")
        elif slower is not None and name != candidate:
            lines.append(f"  {candidate:10s} slower {slower.reason} ({slower.record})")
        else:
            if chosen is None and name in ("auto", candidate):
                chosen = candidate
            lines.append(f"  {candidate:10s} yes")
    note = "auto" if name == "auto" else source
    lines.append(f"  runs on    {chosen or 'nothing: the call would be refused'} ({note})")
    details = getattr(call, "details", None)
    if details is not None:
        lines.extend(f"  {line}" for line in details())
    return "\n".join(lines)
