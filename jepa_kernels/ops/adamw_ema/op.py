"""The contract of adamw_ema: one schema and one fake for every backend, whose name is an argument
of the op.

There is nothing to differentiate: the op runs under no_grad and writes in place.
"""

from __future__ import annotations

import contextlib
import itertools

import torch

from ... import checks
from ...backend import BackendUnsupportedError, Room
from ..ema_update.checked import are_arguments_checked, arguments_checked
from ..ema_update.op import check_momentum
from .call import Call
from .lists import Lists
from .preferences import PREFERENCES
from .teacher import TeacherLists

PRIORITY = ("cuda", "triton", "cpu", "torch", "reference")
COLUMNS = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")

_NAME = "adamw_ema_"
_library = torch.library.Library("jepa_kernels", "FRAGMENT")
_library.define(
    "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
    "exp_avg_sqs, Tensor[] steps, Tensor hyper, "
    "int[] groups, Tensor(d!)[] targets, Tensor momentum, Tensor(e!)[] copies, Tensor(f!)[] "
    "compensations, Tensor? seed, str rounding, "
    "Tensor? grad_scale, Tensor? found_inf, str backend) -> ()"
)


def run(
    backend: str, lists: Lists, hyper, groups, momentum, seed, rounding: str, grad_scale, found_inf
) -> None:
    """Runs a checked call on `backend`."""
    # Not while compiling: a graph must not depend on a state of this process.
    with contextlib.nullcontext() if torch.compiler.is_compiling() else arguments_checked():
        torch.ops.jepa_kernels.adamw_ema_(
            lists.params,
            lists.grads,
            lists.exp_avgs,
            lists.exp_avg_sqs,
            lists.steps,
            hyper,
            groups,
            lists.targets,
            momentum,
            lists.copies,
            lists.compensations,
            seed,
            rounding,
            grad_scale,
            found_inf,
            backend,
        )


def _check_direct_call(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    hyper,
    groups,
    targets,
    momentum,
    copies,
    compensations,
    seed,
    rounding,
    grad_scale,
    found_inf,
    backend,
) -> None:
    """What the public function guarantees and a direct caller of torch.ops could get wrong."""
    from .api import prepare

    if backend not in ROOM.modules:
        raise ValueError(
            checks.sentence(_NAME, "backend", f"be one of {', '.join(PRIORITY)}", repr(backend))
        )
    teacher = TeacherLists(targets, momentum, copies or None, rounding, compensations or None, seed)
    call = prepare(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        hyper=hyper,
        groups=groups,
        teacher=teacher,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    reasons = ROOM.reasons(backend, call)
    if reasons:
        raise BackendUnsupportedError(
            f"{_NAME} cannot run on backend '{backend}': {'; '.join(reasons)}"
        )


def _update(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    hyper,
    groups,
    targets,
    momentum,
    copies,
    compensations,
    seed,
    rounding,
    grad_scale,
    found_inf,
    backend,
) -> None:
    if not are_arguments_checked():
        _check_direct_call(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            hyper,
            groups,
            targets,
            momentum,
            copies,
            compensations,
            seed,
            rounding,
            grad_scale,
            found_inf,
            backend,
        )
    _check_values(params, steps, targets, momentum, found_inf)
    lists = Lists(params, grads, exp_avgs, exp_avg_sqs, steps, targets, copies, compensations)
    if params:
        streams = list(range(len(targets)))
        ROOM.modules[backend].forward(
            lists, hyper, list(groups), momentum, streams, rounding, seed, grad_scale, found_inf
        )
    # Kernels write through raw pointers, which autograd's version counters do not see (inference
    # tensors have none).
    torch.autograd.graph.increment_version(
        list(itertools.filterfalse(torch.Tensor.is_inference, lists.written()))
    )


def _check_values(params, steps, targets, momentum, found_inf) -> None:
    check_momentum(_NAME, momentum)
    for argument, values in (("params", params), ("targets", targets)):
        addresses = [a for a in map(torch.Tensor.data_ptr, values) if a]
        if len(set(addresses)) != len(addresses):
            raise ValueError(
                checks.sentence(_NAME, argument, "be distinct tensors", "one of them twice")
            )
    if found_inf is not None or not all([s.device.type == "cpu" for s in steps]):
        return  # a skipped first step has step 0, and a device is not read back
    lowest = min(map(float, steps), default=1.0)
    if not lowest >= 1.0:
        raise ValueError(
            checks.sentence(_NAME, "steps", "be at least 1: they count this step", lowest)
        )


def _fake(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    hyper,
    groups,
    targets,
    momentum,
    copies,
    compensations,
    seed,
    rounding,
    grad_scale,
    found_inf,
    backend,
) -> None:
    # A list with a meta tensor in it comes here too: it is checked, not silently accepted.
    _check_direct_call(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        hyper,
        groups,
        targets,
        momentum,
        copies,
        compensations,
        seed,
        rounding,
        grad_scale,
        found_inf,
        backend,
    )


_library.impl("adamw_ema_", _update, "CompositeExplicitAutograd")
torch.library.register_fake("jepa_kernels::adamw_ema_", _fake, lib=_library)


def _prepare(*args, **kwargs):
    from .api import prepare

    return prepare(*args, **kwargs)


def _example(device_type: str, dtype: torch.dtype) -> Call:
    return Call(
        device_type,
        dtype,
        (dtype,),
        num_tensors=150,
        num_targets=150,
        num_elements=22_000_000,
        rounding="nearest",
    )


ROOM = Room("adamw_ema", PRIORITY, _prepare, _example, PREFERENCES)
