"""CUDA C++ backend: csrc/adamw_ema/cuda, opened lazily behind its C ABI by the stable-ABI
binding."""

from __future__ import annotations

import torch

from ... import native
from ..ema_update.call import ROUNDINGS, dtype_reasons
from .call import Call


def unsupported_reasons(call: Call) -> list[str]:
    return native.cuda_unavailable_reasons(call.device_type) + dtype_reasons(call.dtypes)


def forward(lists, hyper, groups, momentum, streams, rounding, seed, grad_scale, found_inf) -> None:
    with lists.flat(row_major=rounding == "stochastic") as flat:
        torch.ops.jepa_kernels_native.adamw_ema_cuda_(
            flat.params,
            flat.grads,
            flat.exp_avgs,
            flat.exp_avg_sqs,
            flat.steps,
            hyper,
            groups,
            flat.targets,
            momentum,
            flat.copies,
            flat.compensations,
            streams,
            ROUNDINGS.index(rounding),
            seed,
            grad_scale,
            found_inf,
        )
