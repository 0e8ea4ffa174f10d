"""ctypes mirror of csrc/ema_update/params.h and csrc/adamw_ema/params.h over NumPy arrays. No
torch: sanitized children import this."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
NEAREST, KAHAN, STOCHASTIC = 0, 1, 2

Pointer, Int64, Int32, Double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double


class EmaTensor(ctypes.Structure):
    _fields_ = [
        ("target", Pointer),
        ("source", Pointer),
        ("copy", Pointer),
        ("compensation", Pointer),
        ("numel", Int64),
        ("target_dtype", Int32),
        ("source_dtype", Int32),
        ("copy_dtype", Int32),
        ("index", Int32),
    ]


class EmaParams(ctypes.Structure):
    _fields_ = [
        ("tensors", ctypes.POINTER(EmaTensor)),
        ("num_tensors", Int64),
        ("momentum", Double),
        ("momentum_device", Pointer),
        ("rounding", Int64),
        ("seed", Int64),
        ("seed_device", Pointer),
    ]


class AdamwTensor(ctypes.Structure):
    _fields_ = [
        ("param", Pointer),
        ("grad", Pointer),
        ("exp_avg", Pointer),
        ("exp_avg_sq", Pointer),
        ("numel", Int64),
        ("ema", EmaTensor),
        ("param_dtype", Int32),
        ("grad_dtype", Int32),
        ("state_dtype", Int32),
        ("group", Int32),
        ("step", Double),
        ("step_device", Pointer),
    ]


class AdamwParams(ctypes.Structure):
    _fields_ = [
        ("tensors", ctypes.POINTER(AdamwTensor)),
        ("num_tensors", Int64),
        ("hyper", Pointer),
        ("hyper_device", Pointer),
        ("grad_scale", Pointer),
        ("found_inf", Pointer),
        ("momentum", Double),
        ("momentum_device", Pointer),
        ("rounding", Int64),
        ("seed", Int64),
        ("seed_device", Pointer),
    ]


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


def open_library(path: str | Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, params in (
        ("jk_ema_update_cuda_fwd", EmaParams),
        ("jk_adamw_ema_cuda_fwd", AdamwParams),
    ):
        if hasattr(library, name):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.POINTER(params), Pointer], ctypes.c_char_p
    return library


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
