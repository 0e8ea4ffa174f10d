"""Fast eager composition: torch's fused AdamW, one call for each group, then the average by
_foreach operations.

Nothing here waits for a device: a skipped step is selected, not branched on, when its flag is
there.
"""

from __future__ import annotations

import torch

from ...backend import ANY_DEVICE, Backend, Reason
from ..ema.average import update_lists
from .inputs import Inputs


def unsupported(inputs: Inputs) -> list[Reason]:
    return []


def forward(inputs: Inputs) -> None:
    found_inf, momentum = inputs.found_inf, inputs.momentum
    if found_inf is not None and found_inf.device.type == "cpu":
        if bool(found_inf != 0):
            return
        found_inf = None
    # torch's fused AdamW walks raw memory: it is wrong where strides of a parameter and its
    # gradient differ.
    with inputs.flat(row_major=False) as flat:
        _step(flat, found_inf)
    if inputs.targets:
        if found_inf is not None:
            momentum = torch.where(found_inf != 0, 1.0, momentum.to(found_inf.device))
        update_lists(
            inputs.targets,
            inputs.params[: len(inputs.targets)],
            momentum,
            inputs.copies,
            inputs.compensations,
            inputs.streams,
            inputs.rounding,
            inputs.seed,
        )


def _step(lists: Inputs, found_inf: torch.Tensor | None) -> None:
    hyper, groups = lists.hyper, lists.groups
    grads = lists.grads
    if lists.grad_scale is not None:
        grads = list(torch._foreach_div(grads, lists.grad_scale))
    plain = []
    for i, param in enumerate(lists.params):
        if hyper.device.type == "cpu" and param.dtype == grads[i].dtype == lists.exp_avgs[i].dtype:
            plain.append(i)
        else:
            _adamw(
                param,
                grads[i],
                lists.exp_avgs[i],
                lists.exp_avg_sqs[i],
                lists.steps[i],
                hyper[groups[i]],
                found_inf,
            )
    for row in sorted({groups[i] for i in plain}):
        _fused(lists, grads, [i for i in plain if groups[i] == row], hyper[row].tolist(), found_inf)


def _fused(
    lists: Inputs,
    grads: list[torch.Tensor],
    places: list[int],
    row: list[float],
    found_inf: torch.Tensor | None,
) -> None:
    lr, beta1, beta2, eps, weight_decay, maximize = row
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i in places:
        by_dtype.setdefault(lists.params[i].dtype, []).append(i)
    for chosen in by_dtype.values():
        params, gradients, exp_avgs, exp_avg_sqs, steps = (
            [values[i] for i in chosen]
            for values in (lists.params, grads, lists.exp_avgs, lists.exp_avg_sqs, lists.steps)
        )
        steps = [s.to(p.device, torch.float32) for s, p in zip(steps, params, strict=True)]
        torch._fused_adamw_(
            params,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=bool(maximize),
            grad_scale=None,
            found_inf=found_inf,
        )


def _adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    row: torch.Tensor,
    found_inf: torch.Tensor | None,
) -> None:
    """One parameter of mixed dtypes, or with hyperparameters on the device; every scalar stays a
    tensor."""
    work = torch.promote_types(param.dtype, torch.float32)
    lr, beta1, beta2, eps, weight_decay, maximize = row.to(param.device).unbind()
    step = step.to(param.device, torch.float64)
    g = torch.where(maximize != 0, -grad.to(work), grad.to(work))
    m = exp_avg.to(work).lerp(g, (1 - beta1).to(work))
    v = exp_avg_sq.to(work) * beta2.to(work) + (1 - beta2).to(work) * g * g
    size, inverse = (lr / (1 - beta1**step)).to(work), (1 - beta2**step).rsqrt().to(work)
    p = param.to(work) * (1 - lr * weight_decay).to(work) - size * (
        m / (v.sqrt() * inverse + eps.to(work))
    )
    for old, new in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
        old.copy_(new if found_inf is None else torch.where(found_inf != 0, old.to(work), new))


BACKEND = Backend("torch", ANY_DEVICE, unsupported, forward)
