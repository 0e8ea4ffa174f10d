"""The C ABI of ema_update and adamw_ema on NumPy arrays. No torch: sanitized children import
this."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from tests.abi.header import read

ABI = read("adamw_ema")  # includes that of ema_update
FLOAT32, BFLOAT16, FLOAT16 = (ABI.constants[f"JK_{n}"] for n in ("FLOAT32", "BFLOAT16", "FLOAT16"))
NEAREST, KAHAN, STOCHASTIC = (
    ABI.constants[f"JK_ROUND_{n}"] for n in ("NEAREST", "KAHAN", "STOCHASTIC")
)
EmaTensor, EmaParams, AdamwTensor, AdamwParams = (
    ABI.structs[f"jk_{n}"]
    for n in ("ema_tensor", "ema_update_params", "adamw_tensor", "adamw_ema_params")
)
open_library = ABI.open


def address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def dtype_code(array: np.ndarray | None) -> int:
    """bfloat16 travels as its bits in uint16."""
    return (
        0
        if array is None
        else {"float32": FLOAT32, "uint16": BFLOAT16, "float16": FLOAT16}[array.dtype.name]
    )


def ema_tensor(target, source=None, copy=None, compensation=None, index: int = 0) -> EmaTensor:
    return EmaTensor(
        address(target),
        address(source),
        address(copy),
        address(compensation),
        0 if target is None else target.size,
        dtype_code(target),
        dtype_code(source),
        dtype_code(copy),
        index,
    )


def adamw_tensor(
    param, grad, exp_avg, exp_avg_sq, ema: EmaTensor, *, group: int, step: float, step_device=None
) -> AdamwTensor:
    return AdamwTensor(
        address(param),
        address(grad),
        address(exp_avg),
        address(exp_avg_sq),
        param.size,
        ema,
        dtype_code(param),
        dtype_code(grad),
        dtype_code(exp_avg),
        group,
        step,
        address(step_device),
    )


def ema_update(
    library,
    tensors: Sequence[EmaTensor],
    momentum: float,
    *,
    momentum_device=None,
    rounding=NEAREST,
    seed=0,
    seed_device=None,
) -> bytes | None:
    """Runs the kernel; returns its sentence when something is wrong."""
    array = (EmaTensor * len(tensors))(*tensors)
    params = EmaParams(
        array,
        len(tensors),
        momentum,
        address(momentum_device),
        rounding,
        seed,
        address(seed_device),
    )
    return library.jk_ema_update_cuda_fwd(ctypes.byref(params), None)


def adamw_ema(
    library,
    tensors: Sequence[AdamwTensor],
    hyper: np.ndarray,
    momentum: float,
    *,
    hyper_on_device=False,
    grad_scale=None,
    found_inf=None,
    rounding=NEAREST,
    seed=0,
) -> bytes | None:
    array = (AdamwTensor * len(tensors))(*tensors)
    host, device = (None, address(hyper)) if hyper_on_device else (address(hyper), None)
    params = AdamwParams(
        array,
        len(tensors),
        host,
        device,
        address(grad_scale),
        address(found_inf),
        momentum,
        None,
        rounding,
        seed,
        None,
    )
    return library.jk_adamw_ema_cuda_fwd(ctypes.byref(params), None)
