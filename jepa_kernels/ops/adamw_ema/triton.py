"""Triton backend: NVIDIA GPUs from compute capability 8.0, and CPU tensors under
TRITON_INTERPRET=1. The kernel is imported on first use.

One launch for each combination of dtypes in the list. Nothing reads a device tensor's values on the
host.
"""

from __future__ import annotations

import torch

from ... import triton_runtime
from ...backend import Backend, Reason
from ...device_tables import DeviceTables, upload
from ..ema.lists import ROUNDINGS
from ..ema.triton_launch import by_dtypes, dtype_of, on_the_device, weights
from ..ema.triton_table import table
from .inputs import Inputs, kernel_reasons


def unsupported(inputs: Inputs) -> list[Reason]:
    return triton_runtime.unavailable_reasons(inputs.device_type) + kernel_reasons(inputs)


def forward(inputs: Inputs) -> None:
    from .triton_kernels import BLOCK, FUSION, adamw_ema_kernel

    device = inputs.params[0].device
    with inputs.flat() as flat, triton_runtime.device_of(inputs.params[0]):
        pointer, keep, take = weights(flat.momentum, device)
        seed = None if flat.seed is None else on_the_device(flat.seed, device)
        scalars = step_scalars(flat.steps, flat.hyper, flat.groups, flat.grad_scale, device)
        # Parameters without a teacher, and empty ones, complete the lists that belong to the first
        # parameters.
        missing = len(flat.params)
        targets, copies, compensations = (
            [*values, *[None] * (missing - len(values))]
            for values in (flat.targets, flat.copies, flat.compensations)
        )
        streams = [*flat.streams, *[0] * (missing - len(flat.streams))]
        for places in by_dtypes(flat.params, flat.grads, flat.exp_avgs, targets, copies):
            places = [i for i in places if flat.params[i].numel()]
            if not places:
                continue
            first = places[0]
            arrays = (
                flat.params,
                flat.grads,
                flat.exp_avgs,
                flat.exp_avg_sqs,
                targets,
                copies,
                compensations,
            )
            rows = table(
                [[values[i] for i in places] for values in arrays],
                [streams[i] for i in places],
                BLOCK,
            )
            chosen = (
                scalars
                if len(places) == missing
                else scalars.index_select(0, index(tuple(places), device))
            )
            adamw_ema_kernel[(rows.chunks.shape[0],)](
                rows.rows,
                rows.chunks,
                chosen,
                inputs.found_inf,
                pointer,
                keep,
                take,
                seed,
                PARAM=dtype_of(flat.params[first]),
                GRAD=dtype_of(flat.grads[first]),
                STATE=dtype_of(flat.exp_avgs[first]),
                TARGET=dtype_of(targets[first]),
                COPY=dtype_of(copies[first]),
                ROUNDING=ROUNDINGS.index(flat.rounding),
                ALIGNED=rows.aligned,
                BLOCK=BLOCK,
                num_warps=4,
                **FUSION,
            )


def step_scalars(
    steps: list[torch.Tensor],
    hyper: torch.Tensor,
    groups: list[int],
    grad_scale: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """float32 [tensors, 8], the columns of the kernel's `scalars`; computed in float64 where the
    steps are, host or device."""
    home = (
        device
        if hyper.device.type != "cpu" or any(s.device.type != "cpu" for s in steps)
        else torch.device("cpu")
    )
    step = torch.stack([s.to(home, torch.float64) for s in steps])
    lr, beta1, beta2, eps, weight_decay, maximize = (
        upload(hyper, home).index_select(0, index(tuple(groups), home)).unbind(1)
    )
    columns = (
        1 - lr * weight_decay,
        torch.where(maximize != 0, -1.0, 1.0).to(torch.float64),
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        (1 - beta2**step).rsqrt(),
        eps,
    )
    scalars = upload(torch.stack(columns, dim=1).to(torch.float32), device)
    if grad_scale is not None:
        scalars[:, 1] /= grad_scale.reshape(())
    return scalars


_indices = DeviceTables(256)


def index(places: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`places` as an int64 tensor, kept: an optimizer asks for the same ones at every step."""
    key = (places, device)
    return _indices.get(key, device, lambda: (upload(torch.tensor(places), device),))[0]


BACKEND = Backend("triton", triton_runtime.DEVICES, unsupported, forward)
