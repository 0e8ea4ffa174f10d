"""The public function of ema_update and its checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import checks
from ...backend import resolve
from . import op as _op
from . import shards
from .call import ROUNDINGS, Call

_NAME = "ema_update_"
_HALF = (torch.bfloat16, torch.float16)


def ema_update_(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    *,
    copies: Sequence[torch.Tensor] | None = None,
    rounding: str = "nearest",
    compensations: Sequence[torch.Tensor] | None = None,
    seed: int | torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Moves every target towards its source, in place and in one pass over the whole list.

        target <- momentum * target + (1 - momentum) * source

    The teacher update of BYOL (Grill et al. 2020, arXiv:2006.07733, section 3.1) and of the JEPA
    papers; evaluated as torch.lerp evaluates it, so that momentum 0 and 1 and source == target are
    exact.

    Args:
        targets: tensors to update, float32, bfloat16 or float16 in any mix (float64 on the
            reference and torch backends), on one device. A tensor that occurs twice is updated
            once. May be non-contiguous, which costs a copy unless it is dense. Targets must not
            overlap in part.
        sources: one tensor for each target, of its shape, any of the dtypes. Not differentiated.
        momentum: a number from 0 to 1, or a 0-d float tensor on the CPU or on the targets' device.
            A device tensor is never read back.
        copies: None, or one tensor for each target that receives the new target in its own dtype,
            in the same pass.
        rounding: of bfloat16 and float16 targets, computed in float32: ``"nearest"`` loses updates
            below half a unit in the last place (1 - momentum of 1e-3 and less); ``"kahan"`` keeps
            what was lost in `compensations`; ``"stochastic"`` (bfloat16 only) rounds up with the
            probability of the lost fraction, so that the mean moves.
        compensations: with ``"kahan"`` one tensor for each target, of its shape and dtype, zero at
            first; entries of float32 targets are not read and may be empty.
        seed: with ``"stochastic"`` an int or a 0-d int64 tensor; give another one at every step.
            Random bits are a function of (seed, place in the list, element) alone.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Returns:
        None; `targets`, `copies` and `compensations` are written. Empty lists and empty tensors are
        left alone.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        BackendUnsupportedError: the chosen backend cannot run this call; every reason is listed.

    Notes:
        The cpu, triton and cuda backends and the reference give bitwise equal results for any
        thread count; products and sums are rounded one by one in float32. DTensor lists (FSDP2) are
        updated shard by shard, without communication; the lists must be sharded alike. Under
        stochastic rounding element numbers are those of the local shard.

    Example:
        >>> import torch
        >>> from jepa_kernels import ema_update_
        >>> teacher, student = [torch.zeros(3)], [torch.ones(3)]
        >>> ema_update_(teacher, student, 0.75)
        >>> teacher
        [tensor([0.2500, 0.2500, 0.2500])]
    """
    named = {
        "targets": targets,
        "sources": sources,
        "copies": copies,
        "compensations": compensations,
    }
    for argument, values in named.items():
        check_list(_NAME, argument, values, optional=argument in ("copies", "compensations"))
    with torch.no_grad():
        lists = shards.local(_NAME, named)
        targets, sources, copies, compensations = (
            lists["targets"],
            lists["sources"],
            lists.get("copies"),
            lists.get("compensations"),
        )
        call = describe(targets, sources, momentum, copies, rounding, compensations, seed)
        if not targets:
            return
        name = resolve(_op.ROOM, call, backend)
        _op.run(
            name,
            targets,
            sources,
            momentum_tensor(momentum),
            copies or [],
            compensations or [],
            seed_tensor(seed),
            rounding,
        )


def momentum_tensor(momentum: float | torch.Tensor) -> torch.Tensor:
    """A number becomes a tensor before the op, so that a schedule neither recompiles nor
    synchronises."""
    if isinstance(momentum, torch.Tensor):
        return momentum.detach().to(torch.float64)
    return torch.tensor(momentum, dtype=torch.float64, device="cpu")


def seed_tensor(seed: int | torch.Tensor | None) -> torch.Tensor | None:
    if seed is None or isinstance(seed, torch.Tensor):
        return seed
    return torch.tensor(seed, dtype=torch.int64, device="cpu")


def prepare(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    *,
    copies: Sequence[torch.Tensor] | None = None,
    rounding: str = "nearest",
    compensations: Sequence[torch.Tensor] | None = None,
    seed: int | torch.Tensor | None = None,
) -> Call:
    """Checks every argument (shapes, dtypes, devices; values of plain numbers only) and describes
    the call."""
    named = {
        "targets": targets,
        "sources": sources,
        "copies": copies,
        "compensations": compensations,
    }
    for argument, values in named.items():
        check_list(_NAME, argument, values, optional=argument in ("copies", "compensations"))
    return describe(targets, sources, momentum, copies, rounding, compensations, seed)


def describe(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    copies: Sequence[torch.Tensor] | None,
    rounding: str,
    compensations: Sequence[torch.Tensor] | None,
    seed: int | torch.Tensor | None,
) -> Call:
    """What `prepare` does with arguments that are known to be lists of tensors."""
    device = targets[0].device if targets else torch.device("cpu")
    dtypes: list[torch.dtype] = []
    shapes = [t.shape for t in targets]
    for argument, values in (("targets", targets), ("sources", sources), ("copies", copies)):
        if values is not None:
            dtypes += check_entries(_NAME, argument, values, "targets", shapes, device)
    check_momentum(_NAME, momentum, device)
    check_rounding(_NAME, rounding, targets, compensations, seed, device)
    return Call(
        device_type=device.type,
        dtype=targets[0].dtype if targets else torch.float32,
        dtypes=tuple(_distinct(dtypes)),
        num_tensors=len(targets),
        num_elements=sum([t.numel() for t in targets]),
        rounding=rounding,
        copies=copies is not None,
    )


def check_list(op: str, argument: str, values: object, optional: bool = False) -> None:
    if optional and values is None:
        return
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            checks.sentence(op, argument, "be a list of tensors", checks.type_name(values))
        )
    for i, tensor in enumerate(values):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                checks.sentence(op, f"{argument}[{i}]", "be a tensor", checks.type_name(tensor))
            )


def check_entries(
    op: str,
    argument: str,
    values: Sequence[torch.Tensor],
    like: str,
    shapes: Sequence[torch.Size],
    device: torch.device,
) -> list[torch.dtype]:
    """`values` are strided float tensors on `device` of the shapes of the list `like`. Returns
    their dtypes, each once."""
    if len(values) != len(shapes):
        raise ValueError(
            checks.sentence(
                op, argument, f"have one tensor for each of {like} ({len(shapes)})", len(values)
            )
        )
    # Whole lists first, entry by entry only to say what is wrong: this runs at every step over
    # hundreds of tensors.
    dtypes = _distinct([t.dtype for t in values])
    sound = all(d in checks.FLOAT_DTYPES for d in dtypes) and all(
        [t.device == device and t.layout == torch.strided for t in values]
    )
    if sound and [t.shape for t in values] == shapes:
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


def _distinct(dtypes: Sequence[torch.dtype]) -> list[torch.dtype]:
    return list(dict.fromkeys(dtypes))


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


def check_rounding(
    op: str,
    rounding: str,
    targets: Sequence[torch.Tensor],
    compensations: Sequence[torch.Tensor] | None,
    seed: int | torch.Tensor | None,
    device: torch.device,
) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(
            checks.sentence(op, "rounding", f"be one of {', '.join(ROUNDINGS)}", repr(rounding))
        )
    if (compensations is not None) != (rounding == "kahan"):
        state = "given" if rounding == "kahan" else "None"
        raise ValueError(
            checks.sentence(
                op,
                "compensations",
                f"be {state} with rounding {rounding!r}",
                checks.type_name(compensations),
            )
        )
    if (seed is not None) != (rounding == "stochastic"):
        state = "given" if rounding == "stochastic" else "None"
        raise ValueError(
            checks.sentence(
                op, "seed", f"be {state} with rounding {rounding!r}", checks.type_name(seed)
            )
        )
    if compensations is not None:
        _check_compensations(op, targets, compensations, device)
    if seed is not None:
        _check_seed(op, seed, device)
        for i, target in enumerate(targets):
            if target.dtype == torch.float16:
                hint = "Use rounding 'kahan' for float16."
                raise ValueError(
                    checks.sentence(
                        op,
                        f"targets[{i}]",
                        "be bfloat16 or float32 with stochastic rounding",
                        "float16",
                        hint,
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


def _check_seed(op: str, seed: int | torch.Tensor, device: torch.device) -> None:
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
