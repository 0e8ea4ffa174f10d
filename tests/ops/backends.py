"""Which backends of an op run on this machine, as the op's own table tells."""

from __future__ import annotations

import torch

from jepa_kernels.backend import ANY_DEVICE, OPS
from jepa_kernels.support import example

GPU = torch.cuda.is_available()
DEVICES = ("cpu", "cuda") if GPU else ("cpu",)


def device_of(op: str, backend: str) -> str:
    """The device type on which tests run this backend."""
    devices = OPS[op].backends[backend].devices
    return "cpu" if devices == ANY_DEVICE or "cpu" in devices else devices[0]


def runnable(
    op: str, dtype: torch.dtype = torch.float32, *, reference: bool = False
) -> tuple[str, ...]:
    """Backends that run an ordinary call of this dtype here, the specification only on request."""
    return tuple(
        name
        for name in reversed(OPS[op].priority)
        if (reference or name != "reference")
        and device_of(op, name) in DEVICES
        and not OPS[op].reasons(name, example(OPS[op], device_of(op, name), dtype))
    )
