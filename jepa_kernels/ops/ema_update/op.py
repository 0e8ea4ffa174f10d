"""The contract of ema_update: one schema and one fake for every backend, whose name is an argument
of the op.

There is nothing to differentiate: the op runs under no_grad and writes in place.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch

from ... import checks
from ...backend import BackendUnsupportedError, Room
from . import memory
from .call import Call
from .checked import are_arguments_checked, arguments_checked
from .preferences import PREFERENCES

PRIORITY = ("cuda", "triton", "cpu", "torch", "reference")

_NAME = "ema_update_"
_library = torch.library.Library("jepa_kernels", "FRAGMENT")
_library.define(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor momentum, Tensor(b!)[] copies, "
    "Tensor(c!)[] compensations, "
    "Tensor? seed, str rounding, str backend) -> ()"
)

Tensors = Sequence[torch.Tensor]


def run(
    backend: str,
    targets: Tensors,
    sources: Tensors,
    momentum: torch.Tensor,
    copies: Tensors,
    compensations: Tensors,
    seed: torch.Tensor | None,
    rounding: str,
) -> None:
    """Runs a checked call on `backend`."""
    # Not while compiling: a graph must not depend on a state of this process.
    with contextlib.nullcontext() if torch.compiler.is_compiling() else arguments_checked():
        torch.ops.jepa_kernels.ema_update_(
            targets, sources, momentum, copies, compensations, seed, rounding, backend
        )


def check_momentum(op: str, momentum: torch.Tensor) -> None:
    """The value of a momentum tensor, where reading it waits for nothing."""
    if checks.values_are_checked(momentum):
        value = float(momentum)
        if not 0.0 <= value <= 1.0:
            raise ValueError(checks.sentence(op, "momentum", "be from 0 to 1", value))


def _check_direct_call(
    targets, sources, momentum, copies, compensations, seed, rounding, backend
) -> None:
    """What the public function guarantees and a direct caller of torch.ops could get wrong."""
    from .api import prepare

    if backend not in ROOM.modules:
        raise ValueError(
            checks.sentence(_NAME, "backend", f"be one of {', '.join(PRIORITY)}", repr(backend))
        )
    call = prepare(
        targets,
        sources,
        momentum,
        copies=copies or None,
        rounding=rounding,
        compensations=compensations or None,
        seed=seed,
    )
    reasons = ROOM.reasons(backend, call)
    if reasons:
        raise BackendUnsupportedError(
            f"{_NAME} cannot run on backend '{backend}': {'; '.join(reasons)}"
        )


def _update(targets, sources, momentum, copies, compensations, seed, rounding, backend) -> None:
    if not are_arguments_checked():
        _check_direct_call(
            targets, sources, momentum, copies, compensations, seed, rounding, backend
        )
    check_momentum(_NAME, momentum)
    written = [*targets, *copies, *compensations]
    streams: Sequence[int] = range(len(targets))
    first = memory.unique(targets, sources)
    if first is not None:
        targets, sources = [targets[i] for i in first], [sources[i] for i in first]
        copies, compensations = (
            [values[i] for i in first] if values else [] for values in (copies, compensations)
        )
        streams = first
    if targets:
        ROOM.modules[backend].forward(
            targets, sources, momentum, copies, compensations, list(streams), rounding, seed
        )
    # Kernels write through raw pointers, which autograd's version counters do not see (inference
    # tensors have none).
    torch.autograd.graph.increment_version(
        list(itertools.filterfalse(torch.Tensor.is_inference, written))
    )


def _fake(targets, sources, momentum, copies, compensations, seed, rounding, backend) -> None:
    # A list with a meta tensor in it comes here too: it is checked, not silently accepted.
    _check_direct_call(targets, sources, momentum, copies, compensations, seed, rounding, backend)


_library.impl("ema_update_", _update, "CompositeExplicitAutograd")
torch.library.register_fake("jepa_kernels::ema_update_", _fake, lib=_library)


def _prepare(*args, **kwargs):
    from .api import prepare

    return prepare(*args, **kwargs)


def _example(device_type: str, dtype: torch.dtype) -> Call:
    return Call(
        device_type,
        dtype,
        (dtype,),
        num_tensors=150,
        num_elements=22_000_000,
        rounding="nearest",
        copies=False,
    )


ROOM = Room("ema_update", PRIORITY, _prepare, _example, PREFERENCES)
