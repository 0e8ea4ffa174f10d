"""Can Triton run here, and for which GPU would it compile? Host facts only: importing this module
does not import triton."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch

from . import capability
from .backend import Reason

# Triton releases this package is written for; torch picks the exact one.
SUPPORTED = "3.6 to 3.9"


# Asked at import, not behind functools.cache: Dynamo of torch 2.11 traces through the cache and
# refuses find_spec.
_INSTALLED = importlib.util.find_spec("triton") is not None


def installed() -> bool:
    """True where `import triton` would find something. Never imports it: that costs seconds."""
    return _INSTALLED


def interpreting() -> bool:
    """True under TRITON_INTERPRET=1: kernels run in Python on CPU tensors, slowly, for tests of
    their meaning."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# Device types whose tensors Triton takes in this process.
DEVICES = ("cuda", "cpu") if interpreting() else ("cuda",)


def unavailable_reasons(device_type: str) -> list[Reason]:
    """Why Triton kernels cannot run on tensors of `device_type` here; empty when they can. Reads no
    values and launches nothing."""
    said = []
    if not installed():
        said.append(
            f"triton is not installed ({SUPPORTED}; pip install triton, in the version that this "
            "torch names)"
        )
    if device_type == "cpu":
        if not interpreting():
            said.append(
                "tensors must be on a CUDA device (a CPU runs Triton only under "
                "TRITON_INTERPRET=1), got cpu"
            )
    elif device_type != "cuda":
        said.append(f"tensors must be on a CUDA device, got {device_type}")
    elif torch.version.hip is not None:
        said.append("the tile table knows NVIDIA GPUs only, got a ROCm build of torch")
    elif not interpreting():
        said += capability.reasons()
    return [Reason(text, "machine") for text in said]


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors': enter this around."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def architecture(device: torch.device) -> int:
    """The row of a tile table: 80, 90, 100 or 120 for a GPU, and 0 for the interpreter.

    8.6 to 8.9 have the shared memory of 12.0 (99 KiB a block) and its mma.sync instructions, so
    they take its tiles.
    """
    if interpreting() or device.type != "cuda":
        return 0
    major, minor = _device_capability(device)
    if major == 8:
        return 80 if minor in (0, 7) else 120
    return {9: 90, 10: 100, 11: 100}.get(major, 120)


@functools.cache
def _device_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
