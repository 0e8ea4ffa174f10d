"""Loads the compiled libraries, or keeps the sentence that says why one is missing. Importing this
module never compiles anything."""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import capability
from .backend import Reason

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
ABI_VERSION = 1
# The native ops. A copy of the package under another name has a library under another name, so that
# two copies can meet in one process.
ops: Any = getattr(torch.ops, f"{__package__}_native")
# The one wording of refusals, behind the place in the source that torch's check puts before it; the
# stable ABI knows no ValueError.
_SENTENCE = re.compile(r"(?:^|, )(\w+: .+ must .+)", re.MULTILINE)

_here = Path(__file__).parent
_library = _here / "_native.so"
_cuda_library = _here / "_cuda.so"
_BUILD_HINT = "build it with: pip install -e . --no-build-isolation"


def _load() -> str | None:
    if not _library.exists():
        if shutil.which(os.environ.get("CXX", "g++").split()[-1]) is None:
            return (
                "the native library is not built, and there is no C++ compiler (install g++, for "
                f"example with apt-get install g++, then {_BUILD_HINT})"
            )
        return f"the native library is not built ({_BUILD_HINT})"
    try:
        torch.ops.load_library(str(_library))
    except OSError as error:
        return f"the native library does not load: {error}"
    if ops.abi_version() != ABI_VERSION:
        return f"the native library is from another version of this package ({_BUILD_HINT})"
    if _cuda_library.exists():
        ops.set_cuda_library(str(_cuda_library))
    return None


_reason: str | None = _load()
_available = _reason is None
# Looked up once: torch.compile traces the checks below and cannot trace a file system.
_cuda_built = _cuda_library.exists()


def library_stamp() -> str:
    """Tells builds of the native library apart: size and time of the file, or that it is absent."""
    if not _available:
        return "absent"
    status = _library.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def available() -> bool:
    return _available


def reason() -> str | None:
    """Why the native library is missing, or None."""
    return _reason


def cuda_reason() -> str | None:
    """Why the CUDA library cannot be used, or None. Loads nothing."""
    if not _available:
        return _reason
    if not _cuda_built:
        return (
            "the CUDA library is not built: nvcc was not found (install CUDA 12.4 or later, "
            f"then {_BUILD_HINT})"
        )
    return None


def _reasons(missing: str | None, device_type: str, wanted: str) -> list[Reason]:
    if missing is None and device_type == wanted:
        return []
    reasons = [] if missing is None else [Reason(missing, "machine")]
    if device_type != wanted:
        place = "a CPU" if wanted == "cpu" else "a CUDA device"
        reasons.append(Reason(f"tensors must be on {place}, got {device_type}", "machine"))
    return reasons


def cpu_unavailable_reasons(device_type: str) -> list[Reason]:
    """Why the C++ kernels cannot run on tensors of `device_type` here; empty when they can."""
    return _reasons(_reason, device_type, "cpu")


def cuda_unavailable_reasons(device_type: str) -> list[Reason]:
    """Why the CUDA C++ kernels cannot run on tensors of `device_type` here; empty when they can."""
    reasons = _reasons(cuda_reason(), device_type, "cuda")
    if device_type == "cuda":
        reasons += [Reason(text, "machine") for text in capability.reasons()]
    return reasons


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a native op. What it says about a value is a ValueError, as if Python had read it."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise meant(error) from None


def meant(error: RuntimeError) -> Exception:
    """What a native op's error is to a caller: a ValueError where it says something about a
    value."""
    said = _SENTENCE.search(str(error))
    return error if said is None else ValueError(said[1])


def overload(name: str) -> Any:
    """A native op for calls that take no longer than a look-up, or None where the library is
    missing: its only overload, without that one's frame in Python."""
    if not _available:
        return None
    found = getattr(ops, name).default
    return getattr(found, "_op", found)


def _validated_isa() -> int:
    name = os.environ.get("JEPA_KERNELS_ISA", "auto")
    if name == "auto":
        return -1
    if name not in ISAS:
        raise ValueError(
            f"jepa_kernels: JEPA_KERNELS_ISA must be one of auto, {', '.join(ISAS)}, got {name!r}."
        )
    return ISAS.index(name)


_forced_isa = _validated_isa()
_machine_isa = ops.cpu_isa() if _available else 0
if _available and _forced_isa > _machine_isa:
    raise ValueError(
        "jepa_kernels: JEPA_KERNELS_ISA must be one that this processor has (at most "
        f"{ISAS[_machine_isa]}), got {ISAS[_forced_isa]!r}."
    )


def isa() -> int:
    """The instruction set CPU kernels are asked to use: an index into `ISAS`, or -1 for the best
    one (JEPA_KERNELS_ISA forces one)."""
    return _forced_isa


def isa_name() -> str:
    """The instruction set CPU kernels use here, by name."""
    return ISAS[_machine_isa if _forced_isa < 0 else _forced_isa]


def _processor_flags() -> frozenset[str]:
    """The features that the system lists for the first processor; empty where it lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


# Read once: torch.compile traces cpu_kind and cannot trace a file system.
_has_tiles = "amx_bf16" in _processor_flags()
_cpu_kind = "amx" if _has_tiles and isa_name() == ISAS[-1] else isa_name()


def cpu_kind() -> str:
    """What preferences call this CPU: ``amx`` where the processor has bfloat16 tiles, else the
    instruction set that the kernels use."""
    return _cpu_kind


def multiplies_bf16() -> bool:
    """Whether CPU kernels, and torch's own products on a CPU, multiply bfloat16 faster than float32
    here."""
    return _available and isa_name() == "avx512_bf16"


def host_reason() -> str | None:
    """Why the host module (mask sampling in C++) is missing, or None."""
    try:
        importlib.import_module(f"{__package__}._host")
    except ImportError as error:
        return f"the host module does not import: {error} ({_BUILD_HINT})"
    return None
