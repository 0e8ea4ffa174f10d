"""The public function of adamw_ema and its checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import checks
from ...backend import resolve
from ..ema_update import api as ema_api
from ..ema_update import shards
from . import op as _op
from .call import Call
from .lists import SHARDED, Lists
from .teacher import TeacherLists

_NAME = "adamw_ema_"
_NO_TEACHER = TeacherLists()

Tensors = Sequence[torch.Tensor]


def adamw_ema_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    hyper: torch.Tensor,
    groups: Sequence[int] | None = None,
    teacher: TeacherLists | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One AdamW step of every parameter and the moving average of the result, in place and in one
    pass over memory.

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        p <- p - lr weight_decay p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
        target <- momentum target + (1 - momentum) p

    AdamW: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, as torch.optim.AdamW computes
    it (checked against torch 2.13). The optimizer around it is `jepa_kernels.optim.AdamWEMA`.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of tensors of the same shapes on one device;
            float32, bfloat16 or float16 in any mix (float64 on the reference and torch backends),
            the two moments of a parameter in one dtype. Computed in float32.
        steps: one 0-d float tensor for each parameter, the number of this step from 1; on the CPU
            or, as float32, on the device.
        hyper: float64 ``[groups, 6]``, contiguous: lr, beta1, beta2, eps, weight_decay, maximize (0
            or 1). On the device it is never read back.
        groups: for each parameter its row of `hyper`; None is row 0 for all.
        teacher: targets of the first parameters, momentum, copies and rounding (`TeacherLists`,
            fields as in `ema_update_`); None for none.
        grad_scale: a float32 number on the device by which gradients are divided as they are read
            (they are left as they are).
        found_inf: a float32 number on the device; not 0 leaves everything as it is, teacher
            included, without a synchronisation.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Returns:
        None; all lists but `grads` and `steps` are written. Empty lists and empty tensors are left
        alone.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        BackendUnsupportedError: the chosen backend cannot run this call; every reason is listed.

    Notes:
        Deterministic for any thread count. A teacher follows the parameter as stored, rounded to
        its dtype. DTensor lists (FSDP2) are updated shard by shard; they must be sharded alike.

    Example:
        >>> import torch
        >>> from jepa_kernels import TeacherLists, adamw_ema_
        >>> p, g, target = [torch.ones(2)], [torch.ones(2)], [torch.ones(2)]
        >>> m, v = [torch.zeros(2)], [torch.zeros(2)]
        >>> hyper = torch.tensor([[0.1, 0.9, 0.999, 1e-8, 0.0, 0.0]], dtype=torch.float64)
        >>> adamw_ema_(p, g, m, v, [torch.ones(())], hyper=hyper, teacher=TeacherLists(target, 0.5))
        >>> p, target
        ([tensor([0.9000, 0.9000])], [tensor([0.9500, 0.9500])])
    """
    teacher = _NO_TEACHER if teacher is None else teacher
    _check_kinds(params, grads, exp_avgs, exp_avg_sqs, steps, teacher)
    given = (
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        teacher.targets,
        teacher.copies,
        teacher.compensations,
    )
    with torch.no_grad():
        local = shards.local(_NAME, dict(zip(SHARDED, given, strict=True)))
        lists = Lists(steps=list(steps), **local)
        local_teacher = TeacherLists(
            lists.targets,
            teacher.momentum,
            local.get("copies"),
            teacher.rounding,
            local.get("compensations"),
            teacher.seed,
        )
        call = _describe(lists, hyper, groups, local_teacher, grad_scale, found_inf)
        if not lists.params:
            return
        name = resolve(_op.ROOM, call, backend)
        groups = [0] * len(lists.params) if groups is None else list(groups)
        momentum, seed = (
            ema_api.momentum_tensor(teacher.momentum),
            ema_api.seed_tensor(teacher.seed),
        )
        _op.run(name, lists, hyper, groups, momentum, seed, teacher.rounding, grad_scale, found_inf)


def prepare(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    hyper: torch.Tensor,
    groups: Sequence[int] | None = None,
    teacher: TeacherLists | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> Call:
    """Checks every argument (shapes, dtypes, devices; values of plain numbers only) and describes
    the call."""
    teacher = _NO_TEACHER if teacher is None else teacher
    _check_kinds(params, grads, exp_avgs, exp_avg_sqs, steps, teacher)
    lists = Lists(params, grads, exp_avgs, exp_avg_sqs, steps, teacher.targets)
    return _describe(lists, hyper, groups, teacher, grad_scale, found_inf)


def _describe(
    lists: Lists,
    hyper: torch.Tensor,
    groups: Sequence[int] | None,
    teacher: TeacherLists,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> Call:
    """What `prepare` does with arguments that are known to be lists of tensors."""
    params = lists.params
    device = params[0].device if params else torch.device("cpu")
    dtypes: list[torch.dtype] = []
    shapes = [p.shape for p in params]
    for argument in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        dtypes += ema_api.check_entries(
            _NAME, argument, getattr(lists, argument), "params", shapes, device
        )
    if [t.dtype for t in lists.exp_avgs] != [t.dtype for t in lists.exp_avg_sqs]:
        i = [
            a.dtype == b.dtype for a, b in zip(lists.exp_avgs, lists.exp_avg_sqs, strict=True)
        ].index(False)
        requirement = (
            f"have the dtype of exp_avgs[{i}] ({checks.dtype_name(lists.exp_avgs[i].dtype)})"
        )
        raise ValueError(
            checks.sentence(
                _NAME,
                f"exp_avg_sqs[{i}]",
                requirement,
                checks.dtype_name(lists.exp_avg_sqs[i].dtype),
            )
        )
    _check_steps(lists.steps, params)
    _check_hyper(hyper, groups, params)
    dtypes += _check_teacher(teacher, shapes, device)
    for argument, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        _check_flag(argument, value, device)
    return Call(
        device_type=device.type,
        dtype=params[0].dtype if params else torch.float32,
        dtypes=tuple(dict.fromkeys(dtypes)),
        num_tensors=len(params),
        num_targets=len(teacher.targets),
        num_elements=sum([p.numel() for p in params]),
        rounding=teacher.rounding,
    )


def _check_kinds(params, grads, exp_avgs, exp_avg_sqs, steps, teacher) -> None:
    if not isinstance(teacher, TeacherLists):
        raise TypeError(
            checks.sentence(
                _NAME, "teacher", "be a TeacherLists or None", checks.type_name(teacher)
            )
        )
    named = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "steps": steps,
        "targets": teacher.targets,
        "copies": teacher.copies,
        "compensations": teacher.compensations,
    }
    for argument, values in named.items():
        ema_api.check_list(
            _NAME, argument, values, optional=argument in ("copies", "compensations")
        )


def _check_steps(steps: Tensors, params: Tensors) -> None:
    if len(steps) != len(params):
        raise ValueError(
            checks.sentence(
                _NAME, "steps", f"have one tensor for each of params ({len(params)})", len(steps)
            )
        )
    if all([s.dtype == torch.float32 and s.dim() == 0 and s.device.type == "cpu" for s in steps]):
        return
    for i, (step, param) in enumerate(zip(steps, params, strict=True)):
        if step.dim() != 0 or step.dtype not in (torch.float32, torch.float64):
            got = f"shape {tuple(step.shape)} {checks.dtype_name(step.dtype)}"
            raise ValueError(
                checks.sentence(_NAME, f"steps[{i}]", "be a 0-d float32 or float64 tensor", got)
            )
        if step.device.type != "cpu":
            checks.same_device(_NAME, f"steps[{i}]", step, param.device)
            checks.has_dtype(_NAME, f"steps[{i}]", step, (torch.float32,))


def _check_hyper(hyper: torch.Tensor, groups: Sequence[int] | None, params: Tensors) -> None:
    checks.is_tensor(_NAME, "hyper", hyper)
    checks.has_dtype(_NAME, "hyper", hyper, (torch.float64,))
    if hyper.dim() != 2 or hyper.shape[1] != len(_op.COLUMNS) or not hyper.is_contiguous():
        raise ValueError(
            checks.sentence(
                _NAME,
                "hyper",
                f"be contiguous of shape [groups, {len(_op.COLUMNS)}]",
                tuple(hyper.shape),
            )
        )
    if params and hyper.device.type != "cpu":
        checks.same_device(_NAME, "hyper", hyper, params[0].device)
    if groups is None:
        if hyper.shape[0] != 1:
            raise ValueError(
                checks.sentence(
                    _NAME, "groups", f"be given with {hyper.shape[0]} rows of hyper", "None"
                )
            )
        return
    if len(groups) != len(params):
        raise ValueError(
            checks.sentence(
                _NAME,
                "groups",
                f"have one row number for each of params ({len(params)})",
                len(groups),
            )
        )
    if not params or (min(groups) >= 0 and max(groups) < hyper.shape[0]):
        return
    for i, group in enumerate(groups):
        if not 0 <= group < hyper.shape[0]:
            raise ValueError(
                checks.sentence(
                    _NAME,
                    f"groups[{i}]",
                    f"be a row of hyper from 0 to {hyper.shape[0] - 1}",
                    group,
                )
            )


def _check_teacher(
    teacher: TeacherLists, shapes: Sequence[torch.Size], device: torch.device
) -> list[torch.dtype]:
    if len(teacher.targets) > len(shapes):
        raise ValueError(
            checks.sentence(
                _NAME,
                "targets",
                f"have at most one tensor for each of params ({len(shapes)})",
                len(teacher.targets),
            )
        )
    followed = shapes[: len(teacher.targets)]
    dtypes = ema_api.check_entries(_NAME, "targets", teacher.targets, "params", followed, device)
    if teacher.copies is not None:
        dtypes += ema_api.check_entries(
            _NAME, "copies", teacher.copies, "targets", followed, device
        )
    ema_api.check_momentum(_NAME, teacher.momentum, device)
    ema_api.check_rounding(
        _NAME, teacher.rounding, teacher.targets, teacher.compensations, teacher.seed, device
    )
    return dtypes


def _check_flag(argument: str, value: torch.Tensor | None, device: torch.device) -> None:
    if value is None:
        return
    checks.is_tensor(_NAME, argument, value)
    checks.has_dtype(_NAME, argument, value, (torch.float32,))
    checks.same_device(_NAME, argument, value, device)
    if value.numel() != 1:
        raise ValueError(
            checks.sentence(_NAME, argument, "be one number", f"shape {tuple(value.shape)}")
        )
