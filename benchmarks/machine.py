"""Where a number was measured: device key, versions, commit, and the measured ceilings that floors
are quoted against."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

from jepa_kernels import preferences

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def cpu_isa() -> str:
    """Widest vector extension of this CPU, in the names the kernels dispatch on."""
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^flags\s*:(.*)$", info.read_text(), flags=re.MULTILINE)
        flags = set(match.group(1).split()) if match else set()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "avx512_bf16" if "avx512_bf16" in flags else "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "portable"


def multiplies_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether the device has instructions for bfloat16 products: torch emulates them elsewhere, at
    1 GFLOP/s."""
    return torch.device(device).type != "cpu" or cpu_isa() == "avx512_bf16"


def cores() -> int:
    """CPUs this process may use (a container often sees more than it owns)."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )


def busy() -> bool:
    """More runnable processes than cores: whatever is timed now shares the machine (records keep
    the load average)."""
    return os.getloadavg()[0] > 1.5 * cores()


def device_key(device: torch.device | str = "cpu") -> str:
    """Folder name for records: "cpu-2core-avx2", or the GPU's name in lower case with dashes."""
    device = torch.device(device)
    if device.type == "cpu":
        return f"cpu-{cores()}core-{cpu_isa()}"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return (
        done.stdout.strip().splitlines()[0]
        if done.returncode == 0 and done.stdout.strip()
        else None
    )


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    match = (
        re.search(r"^model name\s*:(.*)$", info.read_text(), flags=re.MULTILINE)
        if info.exists()
        else None
    )
    return match.group(1).strip() if match else platform.processor()


@lru_cache(maxsize=4)
def _static_provenance(device_name: str) -> dict[str, object]:
    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_model(),
        "device_key": device_key(device),
        "device_kind": preferences.device_kind(torch.device(device).type),
        "driver": _driver() if on_gpu else None,
        "cpu_isa": cpu_isa(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "jepa_kernels": _version("jepa_kernels"),
        "git_commit": commit,
        "git_dirty": None if status is None else bool(status),
    }


def provenance(device: torch.device | str = "cpu") -> dict[str, object]:
    """Everything a reader needs to judge or repeat a number. Fields that do not apply are None."""
    return {
        **_static_provenance(str(device)),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _best_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    # With one thread CPU time says what the core can do, however busy the machine is.
    now = (
        time.process_time
        if device.type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter
    )
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = now()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, now() - start)
    return best


def peak_flops(device_name: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Best FLOP/s of a square matrix product with the threads torch has now, measured here once per
    process.

    On a CPU without bfloat16 products the ceiling is the float32 one, since a kernel may convert
    and use it.
    """
    return _peak_flops(device_name, dtype, torch.get_num_threads())


@lru_cache(maxsize=16)
def _peak_flops(device_name: str, dtype: torch.dtype, threads: int) -> float:
    device = torch.device(device_name)
    size = 8192 if device.type == "cuda" else 1024
    kind = dtype if dtype is not torch.bfloat16 or multiplies_bf16(device) else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    torch.mm(left, right)
    return 2.0 * size**3 / _best_seconds(lambda: torch.mm(left, right), device, 6)


def peak_bandwidth(device_name: str = "cpu") -> float:
    """Bytes per second of an in-place read-read-write stream (`a += b`), measured here once per
    process."""
    return _peak_bandwidth(device_name, torch.get_num_threads())


@lru_cache(maxsize=4)
def _peak_bandwidth(device_name: str, threads: int) -> float:
    device = torch.device(device_name)
    count = 2**28 if device.type == "cuda" else 2**24
    left, right = torch.zeros(count, device=device), torch.ones(count, device=device)
    left.add_(right)
    seconds = _best_seconds(lambda: left.add_(right), device, 8)
    return 12.0 * count / seconds
