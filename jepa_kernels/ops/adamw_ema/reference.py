"""The specification of adamw_ema in eager PyTorch, one parameter at a time, in float32 (float64 for
float64 parameters).

AdamW as Loshchilov and Hutter 2019, algorithm 2, writes it (and torch.optim.AdamW computes it):

    m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
    p <- p - lr weight_decay p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

and then target <- momentum target + (1 - momentum) p.
"""

from __future__ import annotations

import torch

from ..ema_update import reference as ema_reference
from .call import Call


def unsupported_reasons(call: Call) -> list[str]:
    return []


def forward(lists, hyper, groups, momentum, streams, rounding, seed, grad_scale, found_inf) -> None:
    if found_inf is not None and bool(found_inf != 0):
        return
    rows = hyper.tolist()
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(
        zip(lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, strict=True)
    ):
        _adamw(param, grad, exp_avg, exp_avg_sq, float(lists.steps[i]), rows[groups[i]], grad_scale)
        if i < len(lists.targets):
            compensation = lists.compensations[i] if rounding == "kahan" else None
            ema_reference.update(
                lists.targets[i], param, momentum, compensation, rounding, seed, streams[i]
            )
            if lists.copies:
                lists.copies[i].copy_(lists.targets[i])


def _adamw(param, grad, exp_avg, exp_avg_sq, step: float, row: list[float], grad_scale) -> None:
    lr, beta1, beta2, eps, weight_decay, maximize = row
    work = torch.float64 if param.dtype == torch.float64 else torch.float32
    p, g, m, v = (t.to(work) for t in (param, grad, exp_avg, exp_avg_sq))
    if grad_scale is not None:
        g = g / grad_scale.to(work)
    if maximize:
        g = -g
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    first = m / (1 - beta1**step)
    second = v / (1 - beta2**step)
    p = p - lr * weight_decay * p - lr * first / (second.sqrt() + eps)
    param.copy_(p)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
