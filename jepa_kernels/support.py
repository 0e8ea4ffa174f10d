"""The support table of docs/backends.md, generated from what each backend says about itself."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .backend import ANY_DEVICE, OPS, Inputs, Op, Reason
from .checks import dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def example(op: Op, device_type: str, dtype: torch.dtype) -> Inputs:
    """Inputs of an ordinary call on a device that need not be here."""
    build = next(iter(op.examples.values()))
    with FakeTensorMode():
        return build(device_type, dtype)


def gap(op: Op, backend: str, dtype: torch.dtype) -> list[Reason]:
    """Why `backend` does not take `dtype` on any machine; empty where some machine can, for calls
    of some ordinary size."""
    devices = op.backends[backend].devices
    device_type = "cpu" if devices == ANY_DEVICE else devices[0]
    found: list[Reason] = []
    for build in op.examples.values():
        with FakeTensorMode():
            inputs = build(device_type, dtype)
        reasons = [reason for reason in op.reasons(backend, inputs) if reason.kind == "call"]
        if not reasons:
            return []
        found = found or reasons
    return found


def table() -> str:
    """Markdown: one row per op and backend, one column per dtype."""
    lines = [
        f"| op | backend | {' | '.join(map(dtype_name, DTYPES))} |",
        f"|---|---|{'---|' * len(DTYPES)}",
    ]
    for op in OPS.values():
        for backend in op.priority:
            cells = ["no" if gap(op, backend, dtype) else "yes" for dtype in DTYPES]
            lines.append(f"| {op.name} | {backend} | {' | '.join(cells)} |")
    return "\n".join(lines)
