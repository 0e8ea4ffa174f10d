"""Which backends of an op run on this machine, as the op's own table tells."""

from __future__ import annotations

from typing import Any

import torch

from jepa_kernels.backend import ANY_DEVICE, OPS
from jepa_kernels.support import example
from tests.ops.devices import on_a_gpu

GPU = torch.cuda.is_available()


def device_of(op: str, backend: str) -> str:
    """The device type on which tests run this backend."""
    devices = OPS[op].backends[backend].devices
    return "cpu" if devices == ANY_DEVICE or "cpu" in devices else devices[0]


def runnable(op: str, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Backends but the specification that run an ordinary call of this dtype on a CPU here."""
    return tuple(
        name
        for name in reversed(OPS[op].priority)
        if name != "reference"
        and device_of(op, name) == "cpu"
        and not OPS[op].reasons(name, example(OPS[op], "cpu", dtype))
    )


def each(op: str) -> tuple[Any, ...]:
    """Parameters of a test over backends: those that run on a CPU here, and those of a GPU, which
    are collected everywhere and run where there is one."""
    of_gpus = (name for name in reversed(OPS[op].priority) if device_of(op, name) != "cpu")
    return (*runnable(op), *(on_a_gpu(name) for name in of_gpus))
