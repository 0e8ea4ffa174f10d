"""Lists of tensors and the numbers that go with them: what they must satisfy."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch

from ... import checks
from ...contract import PLAIN

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "kahan", "stochastic")
_HALF = (torch.bfloat16, torch.float16)

Tensors = Sequence[torch.Tensor]
_FLOATS, _STRIDED = frozenset(checks.FLOAT_DTYPES), frozenset((torch.strided,))
_shape, _dtype, _device, _layout = map(attrgetter, ("shape", "dtype", "device", "layout"))


def size_class(tensors: Tensors) -> str:
    """``tiny`` below 65,536 elements, ``small`` below a million, where the cost of the call itself
    counts, else ``large``."""
    return class_of(sum([t.numel() for t in tensors]))


def class_of(elements: int) -> str:
    return "tiny" if elements < 65_536 else "small" if elements < 1_000_000 else "large"


def momentum_tensor(momentum: float | torch.Tensor) -> torch.Tensor:
    """A number becomes a tensor before the op, so that a schedule neither recompiles nor
    synchronises."""
    if isinstance(momentum, torch.Tensor):
        return momentum.detach().to(torch.float64)
    return torch.tensor(momentum, dtype=torch.float64, device="cpu")


def seed_tensor(
    op: str, seed: int | torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """A checked seed as a tensor, for the same reason."""
    if seed is None:
        return None
    _check_seed(op, seed, device)
    if isinstance(seed, torch.Tensor):
        return seed
    return torch.tensor(seed, dtype=torch.int64, device="cpu")


def check_list(op: str, argument: str, values: object, optional: bool = False) -> None:
    """`values` is a list of tensors, or None where that is allowed."""
    if optional and values is None:
        return
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            checks.sentence(op, argument, "be a list of tensors", checks.type_name(values))
        )
    if not torch.compiler.is_compiling() and set(map(type, values)) <= PLAIN:
        return
    for i, tensor in enumerate(values):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                checks.sentence(op, f"{argument}[{i}]", "be a tensor", checks.type_name(tensor))
            )


def shapes_of(values: Tensors) -> list[torch.Size]:
    return [t.shape for t in values] if torch.compiler.is_compiling() else list(map(_shape, values))


def check_entries(
    op: str,
    argument: str,
    values: Tensors,
    like: str,
    shapes: Sequence[torch.Size],
    device: torch.device,
) -> set[torch.dtype]:
    """`values` are strided float tensors on `device` of the shapes of the list `like`. Returns
    their dtypes."""
    if len(values) != len(shapes):
        raise ValueError(
            checks.sentence(
                op, argument, f"have one tensor for each of {like} ({len(shapes)})", len(values)
            )
        )
    # Whole lists first, by maps that stay in C, and entry by entry only to say what is wrong: this
    # runs at every step over hundreds of tensors. (Dynamo traces a loop, not an attrgetter.)
    compiling = torch.compiler.is_compiling()
    dtypes = {t.dtype for t in values} if compiling else set(map(_dtype, values))
    if (
        not compiling
        and dtypes <= _FLOATS
        and set(map(_device, values)) <= {device}
        and set(map(_layout, values)) <= _STRIDED
        and shapes_of(values) == shapes
    ):
        return dtypes
    for i, (tensor, shape) in enumerate(zip(values, shapes, strict=True)):
        checks.has_dtype(op, f"{argument}[{i}]", tensor, checks.FLOAT_DTYPES)
        checks.is_strided(op, f"{argument}[{i}]", tensor)
        checks.same_device(op, f"{argument}[{i}]", tensor, device)
        if tensor.shape != shape:
            raise ValueError(
                checks.sentence(
                    op,
                    f"{argument}[{i}]",
                    f"have shape {tuple(shape)} like {like}[{i}]",
                    tuple(tensor.shape),
                )
            )
    return dtypes


def check_momentum(op: str, momentum: float | torch.Tensor, device: torch.device) -> None:
    if isinstance(momentum, torch.Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            got = f"shape {tuple(momentum.shape)} {checks.dtype_name(momentum.dtype)}"
            raise ValueError(
                checks.sentence(op, "momentum", "be a number or a 0-d float tensor", got)
            )
        if momentum.device.type != "cpu":
            checks.same_device(op, "momentum", momentum, device)
        return
    checks.is_finite_number(op, "momentum", momentum)
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(checks.sentence(op, "momentum", "be from 0 to 1", momentum))


def check_momentum_value(op: str, momentum: torch.Tensor) -> None:
    """The value of a momentum tensor, where reading it waits for nothing."""
    if checks.values_are_checked(momentum):
        value = float(momentum)
        if not 0.0 <= value <= 1.0:
            raise ValueError(checks.sentence(op, "momentum", "be from 0 to 1", value))


def check_given(op: str, rounding: str, compensations: object, seed: object) -> None:
    """What each rounding needs, and no other takes."""
    if rounding not in ROUNDINGS:
        raise ValueError(
            checks.sentence(op, "rounding", f"be one of {', '.join(ROUNDINGS)}", repr(rounding))
        )
    for argument, value, owner in (
        ("compensations", compensations, "kahan"),
        ("seed", seed, "stochastic"),
    ):
        if (value is not None) != (rounding == owner):
            state = "given" if rounding == owner else "None"
            raise ValueError(
                checks.sentence(
                    op, argument, f"be {state} with rounding {rounding!r}", checks.type_name(value)
                )
            )


def check_rounding(
    op: str,
    rounding: str,
    targets: Tensors,
    compensations: Tensors,
    seed: torch.Tensor | None,
    device: torch.device,
) -> None:
    """`compensations` and `seed` fit the targets and the rounding; an empty list is an absent
    one."""
    given = compensations or (compensations if rounding == "kahan" and not targets else None)
    check_given(op, rounding, given, seed)
    if rounding == "kahan":
        _check_compensations(op, targets, compensations, device)
    if seed is not None:
        _check_seed(op, seed, device)
        for i, target in enumerate(targets):
            if target.dtype == torch.float16:
                raise ValueError(
                    checks.sentence(
                        op,
                        f"targets[{i}]",
                        "be bfloat16 or float32 with stochastic rounding",
                        "float16",
                        "Use rounding 'kahan' for float16.",
                    )
                )


def _check_compensations(
    op: str,
    targets: Sequence[torch.Tensor],
    compensations: Sequence[torch.Tensor],
    device: torch.device,
) -> None:
    if len(compensations) != len(targets):
        raise ValueError(
            checks.sentence(
                op,
                "compensations",
                f"have one tensor for each of targets ({len(targets)})",
                len(compensations),
            )
        )
    for i, (tensor, target) in enumerate(zip(compensations, targets, strict=True)):
        if target.dtype not in _HALF:
            continue
        checks.same_device(op, f"compensations[{i}]", tensor, device)
        if tensor.shape != target.shape or tensor.dtype != target.dtype:
            requirement = (
                f"have shape {tuple(target.shape)} and dtype "
                f"{checks.dtype_name(target.dtype)} like targets[{i}]"
            )
            raise ValueError(
                checks.sentence(
                    op,
                    f"compensations[{i}]",
                    requirement,
                    f"{tuple(tensor.shape)} {checks.dtype_name(tensor.dtype)}",
                )
            )


def _check_seed(op: str, seed: torch.Tensor | int, device: torch.device) -> None:
    if isinstance(seed, torch.Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            got = f"shape {tuple(seed.shape)} {checks.dtype_name(seed.dtype)}"
            raise ValueError(checks.sentence(op, "seed", "be an int or a 0-d int64 tensor", got))
        if seed.device.type != "cpu":
            checks.same_device(op, "seed", seed, device)
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            checks.sentence(op, "seed", "be an int or a 0-d int64 tensor", checks.type_name(seed))
        )
