"""Peak memory of a call: resident set on a CPU (by resetting the kernel's high-water mark),
allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Filled when the context ends; None where it cannot be measured. `added_bytes` is above what
    was resident before."""

    added_bytes: int | None = None
    total_bytes: int | None = None
    how: str = "unavailable"


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), flags=re.MULTILINE)
    if match is None:
        raise RuntimeError(f"memory: {_STATUS} must have the field {field}, got none.")
    return int(match.group(1)) * 1024


def resident_bytes() -> int:
    return _status_bytes("VmRSS")


def release_freed() -> None:
    """Hand freed heap pages back, so that the next peak counts them again (glibc keeps them
    otherwise)."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def reset_high_water() -> bool:
    """True if the kernel let this process reset its own high-water mark (Linux, not every
    sandbox)."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """`with peak_memory("cpu") as peak: step()` then read `peak.added_bytes`."""
    device = torch.device(device)
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.total_bytes = torch.cuda.max_memory_allocated(device)
        peak.added_bytes, peak.how = peak.total_bytes - before, "cuda allocator"
        return
    release_freed()
    measurable = _STATUS.exists() and reset_high_water()
    before = resident_bytes() if measurable else 0
    yield peak
    if measurable:
        peak.total_bytes = _status_bytes("VmHWM")
        peak.added_bytes, peak.how = max(0, peak.total_bytes - before), "resident set"
