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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from . import transforms
from .checks import dtype_name, sentence

ANY_DEVICE = ("any",)


class BackendUnsupportedError(NotImplementedError):
    """A valid call that the chosen backend, or every backend, cannot run here. The message lists
    each reason."""


@dataclass(frozen=True)
class Reason:
    """Why a backend cannot run a call.

    Attributes:
        text: one clause, with the fix where one is known.
        kind: ``"call"`` for what no machine could run, ``"machine"`` for what this one lacks.
    """

    text: str
    kind: Literal["call", "machine"] = "call"

    def __str__(self) -> str:
        return self.text


def dtype_reasons(
    dtypes: tuple[torch.dtype, ...], allowed: tuple[torch.dtype, ...]
) -> list[Reason]:
    """Why a backend that takes `allowed` cannot take these dtypes; empty when it can."""
    refused = [d for d in dtypes if d not in allowed]
    if not refused:
        return []
    wanted = " or ".join(map(dtype_name, allowed))
    return [Reason(f"dtype must be {wanted}, got {', '.join(map(dtype_name, refused))}")]


class Inputs(Protocol):
    """The checked inputs of one call. Backends decide by shapes, dtypes, devices and flags, never
    by values."""

    @property
    def device_type(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def describe(self) -> str:
        """The call on one line, for refusals and `explain`."""
        ...

    def size_class(self) -> str:
        """The row of the preference table that this call belongs to, such as ``short``."""
        ...


@dataclass(frozen=True)
class Backend:
    """One implementation of one op. The last lines of ``ops/<op>/<backend>.py`` make it.

    Attributes:
        name: the word that users choose it by.
        devices: device types whose tensors it takes, the most usual one first; `ANY_DEVICE` for
            what PyTorch itself runs.
        unsupported: inputs -> the reasons why this backend cannot run them, device included.
        forward: inputs -> the op's outputs. None for a backend that only composes.
        backward: (inputs, saved, grad_out, needs) -> one gradient for each differentiable input.
        compose: inputs -> the op's outputs from PyTorch operations, with PyTorch's own autograd;
            None for one that the call does not ask for.
        composes: inputs -> whether `compose` serves this call; None is always, where there is one.
        plain: unchecked inputs of an op that writes in place -> whether it made the call. It checks
            all by itself and, where anything is special or wrong, answers False with nothing
            written.
        checks_values: the kernel itself checks ids, offsets and row numbers on a CPU, so that
            nothing reads them twice.
        facts: more that the op's contract asks of a backend, by name.
    """

    name: str
    devices: tuple[str, ...]
    unsupported: Callable[[Any], list[Reason]]
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    compose: Callable[[Any], tuple[Any, ...]] | None = None
    composes: Callable[[Any], bool] | None = None
    plain: Callable[[Any], bool] | None = None
    checks_values: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def takes(self, device_type: str) -> bool:
        """Whether tensors of this device type are its usual ones."""
        return self.devices == ANY_DEVICE or device_type in self.devices

    def runs_composed(self, inputs: Any) -> bool:
        """Whether PyTorch's own autograd differentiates this call."""
        return self.compose is not None and (self.composes is None or self.composes(inputs))


@dataclass(frozen=True)
class Preference:
    """A case in which `auto` takes `faster` before `slower`, wherever `faster` can run."""

    op: str
    device: str  # an instruction set of CPUs ("avx2", "amx") or an architecture ("sm_90")
    dtype: str
    size_class: str
    slower: str
    faster: str
    why: str  # the measured ratio and its record, as `explain` prints it
    # Holds only where the fact "library" of `faster` starts with this; empty: wherever it can run.
    library: str = ""


class Op:
    """One op: its backends in the order `auto` tries them, and how to read its calls.

    Args:
        name: the op's name, also that of its folder below `package`.
        package: the package whose modules are the backends.
        priority: backend names, in the order in which `auto` tries them.
        prepare: the public function's arguments -> checked inputs.
        examples: size class -> (device type, dtype) -> inputs of an ordinary call of that class,
            the usual one first; made under a fake mode for devices that are not here.
    """

    def __init__(
        self,
        name: str,
        package: str,
        priority: tuple[str, ...],
        prepare: Callable[..., Inputs],
        examples: Mapping[str, Callable[[str, torch.dtype], Inputs]],
    ) -> None:
        self.name, self.priority, self.prepare, self.examples = name, priority, prepare, examples
        self.backends: dict[str, Backend] = {}
        self._candidates: dict[str, tuple[str, ...]] = {}
        for word in priority:
            backend = importlib.import_module(f"{package}.{word}").BACKEND
            if backend.name != word:
                raise ValueError(sentence(name, "BACKEND.name", f"be {word!r}", backend.name))
            self.backends[word] = backend
        OPS[name] = self

    signature: Any  # of the op's inputs; see `contract.Signature`

    def candidates(self, device_type: str) -> tuple[str, ...]:
        """What `auto` tries for tensors of this device type, in order."""
        found = self._candidates.get(device_type)
        if found is None:
            found = tuple(name for name, b in self.backends.items() if b.takes(device_type))
            self._candidates[device_type] = found
        return found

    def reasons(self, backend: str, inputs: Inputs) -> list[Reason]:
        """Why `backend` cannot run these inputs; empty when it can."""
        if backend not in self.backends:
            return [Reason(f"{self.name} has no {backend} backend")]
        obstacle = transforms.obstacle(self.name, backend)
        reasons = self.backends[backend].unsupported(inputs)
        return reasons if obstacle is None else [Reason(obstacle), *reasons]

    def passed_by(self, backend: str, inputs: Inputs) -> Preference | None:
        """Why `auto` passes `backend` by for these inputs, if it does."""
        preference = _preferred(self.name, backend, inputs)
        if preference is None or self.reasons(preference.faster, inputs):
            return None
        if preference.library:
            found = self.backends[preference.faster].facts["library"]()
            return preference if found.startswith(preference.library) else None
        return preference


def _nothing_preferred(op: str, backend: str, inputs: Inputs) -> Preference | None:
    return None


# What looks preferences up; `preferences`, which reads them from files, puts itself here.
_preferred: Callable[[str, str, Inputs], Preference | None] = _nothing_preferred


def prefer_by(look_up: Callable[[str, str, Inputs], Preference | None]) -> None:
    """Makes `auto` ask `look_up` which backends it should pass by."""
    global _preferred
    _preferred = look_up


OPS: dict[str, Op] = {}
# Public functions with an op for each kind of argument: their arguments -> the op of that call.
FAMILIES: dict[str, Callable[..., Op]] = {}
_warned: set[str] = set()


def names() -> tuple[str, ...]:
    """Every backend that some op has, the plainest first."""
    found: dict[str, None] = {}
    for op in OPS.values():
        found.update(dict.fromkeys(reversed(op.priority)))
    return tuple(found)


def _validated(name: str, source: str) -> str:
    choices = ("auto", *names())
    if name not in choices:
        raise ValueError(
            f"jepa_kernels: {source} must be one of {', '.join(choices)}, got {name!r}."
        )
    return name


_environment = os.environ.get("JEPA_KERNELS_BACKEND", "auto")


def check_environment() -> None:
    """JEPA_KERNELS_BACKEND names a backend; asked once all ops are known."""
    _validated(_environment, "JEPA_KERNELS_BACKEND")


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


def resolve(op: Op, inputs: Inputs, backend: str | None = None) -> Backend:
    """The backend that will run these inputs.

    Raises:
        ValueError: `backend` is not a backend name.
        BackendUnsupportedError: the chosen backend (or, for ``auto``, every backend) cannot run
            them.
    """
    name, source = requested(backend)
    if name != "auto":
        reasons = op.reasons(name, inputs)
        if reasons:
            raise BackendUnsupportedError(_refusal(op, inputs, {name: reasons}, name, source))
        return op.backends[name]
    device_type, transformed = inputs.device_type, transforms.active()
    for candidate in op.candidates(device_type):
        record = op.backends[candidate]
        if (
            not (transformed and transforms.obstacle(op.name, candidate))
            and not record.unsupported(inputs)
            and op.passed_by(candidate, inputs) is None
        ):
            if device_type == "cuda" and record.devices == ANY_DEVICE:
                _warn_slow(op, inputs)
            return record
    refused = {candidate: op.reasons(candidate, inputs) for candidate in op.priority}
    raise BackendUnsupportedError(_refusal(op, inputs, refused, "auto", source))


def joined(reasons: list[Reason], separator: str = "; ") -> str:
    return separator.join(reason.text for reason in reasons)


def _warn_slow(op: Op, inputs: Inputs) -> None:
    if torch.compiler.is_compiling() or op.name in _warned:
        return
    _warned.add(op.name)
    refused = {name: op.reasons(name, inputs) for name in op.priority}
    why = "; ".join(f"{name}: {joined(why, ', ')}" for name, why in refused.items() if why)
    warnings.warn(
        f"{op.name} runs on the torch backend on this GPU. {why}", RuntimeWarning, stacklevel=4
    )


def _refusal(
    op: Op, inputs: Inputs, refused: dict[str, list[Reason]], name: str, source: str
) -> str:
    if name == "auto":
        head = f"{op.name} cannot run on any backend."
    else:
        head = f"{op.name} cannot run on backend '{name}' ({source})."
    lines = [head, f"  call    {inputs.describe()}"]
    for backend, reasons in refused.items():
        for i, reason in enumerate(reasons):
            lines.append(f"  {backend if i == 0 else '':7s} {reason.text}")
    others = [b for b in op.priority if b not in refused and not op.reasons(b, inputs)]
    if others:
        lines.append("  try     " + ", ".join(f'backend="{b}"' for b in (*others, "auto")))
    return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """A table of which backend would run this call and why each other one would not; nothing is
    computed.

    Args:
        op: name of a public function or of an op, such as ``"masked_attention"``.
        *args, **kwargs: what the op itself would be given.

    Returns:
        The table as text, one line per backend.

    Raises:
        ValueError: `op` is not the name of an op. TypeError and ValueError of the op itself for a
            bad call.
    """
    if op not in OPS and op not in FAMILIES:
        names = ", ".join((*OPS, *FAMILIES))
        raise ValueError(sentence("explain", "op", f"be one of {names}", repr(op)))
    backend = kwargs.pop("backend", None)
    record = OPS[op] if op in OPS else FAMILIES[op](*args, **kwargs)
    inputs = record.prepare(*args, **kwargs)
    name, source = requested(backend)
    lines = [f"{record.name}  {inputs.describe()}"]
    chosen = None
    for candidate in record.priority:
        reasons = record.reasons(candidate, inputs)
        slower = record.passed_by(candidate, inputs) if not reasons else None
        if reasons:
            lines.append(f"  {candidate:10s} no     {joined(reasons)}")
        elif slower is not None and name != candidate:
            lines.append(f"  {candidate:10s} slower than {slower.faster} here: {slower.why}")
        else:
            if chosen is None and name in ("auto", candidate):
                chosen = candidate
            lines.append(f"  {candidate:10s} yes")
    note = "auto" if name == "auto" else source
    lines.append(f"  runs on    {chosen or 'nothing: the call would be refused'} ({note})")
    details = getattr(inputs, "details", None)
    if details is not None:
        lines.extend(f"  {line}" for line in details())
    return "\n".join(lines)
