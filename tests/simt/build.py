"""Builds a .cu source for the SIMT executor: g++, no GPU, no nvcc. Also a command: `python -m
tests.simt.build FILE.cu`.

    library = ctypes.CDLL(build("csrc/ema_update/cuda/launch.cu"))

A build is cached under build/simt/ by the hash of the compiler, the flags and every file the source
includes.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "simt"
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}

_COMMON = [
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-march=x86-64-v3",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-I",
    str(ROOT / "tests" / "simt"),
    "-x",
    "c++",
]
_FLAGS: dict[str | None, list[str]] = {
    None: ["-O2", "-ftree-vectorize"],
    "asan_ubsan": [
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ],
    "tsan": ["-O1", "-g1", "-fsanitize=thread", "-Wno-tsan"],
}
_RUNTIME = {"asan_ubsan": "libasan.so", "tsan": "libtsan.so"}
# The exit status that a sanitizer gives a child in which it found something.
SANITIZER_STATUS = 66


class BuildError(RuntimeError):
    """The compiler rejected a source; the message is the compiler's."""


def compiler() -> str:
    """The g++ that compiles for the executor; BuildError if there is none, or no machine for its
    code."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(
            "simt: the executor switches stacks in x86-64 assembly and cannot run on "
            f"{platform.machine()}."
        )
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise BuildError("simt: no C++ compiler found, install g++ or set CXX.")
    return found


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"simt: {' '.join(command)} failed:\n{done.stderr[-6000:]}")
    return done.stdout


def build(
    cu_path: str | Path,
    sanitizer: str | None = None,
    defines: Mapping[str, str | int] | None = None,
) -> Path:
    """Compile one .cu file into a shared library and return its path.

    Args:
        cu_path: absolute, or relative to the repository root.
        sanitizer: None, "asan_ubsan" or "tsan". A sanitized library loads only in a process started
            by `run_sanitized`.
        defines: preprocessor names for variants of one source (planted faults, fewer template
            instances).
    """
    if sanitizer not in _FLAGS:
        raise ValueError(
            f"simt: sanitizer must be one of {sorted(k for k in _FLAGS if k)} or None, got "
            f"{sanitizer!r}."
        )
    source = (ROOT / cu_path).resolve()
    flags = (
        _FLAGS[sanitizer]
        + _COMMON
        + [f"-D{name}={value}" for name, value in sorted((defines or {}).items())]
    )
    cxx = compiler()
    includes = _run([cxx, *flags, "-MM", str(source)]).split(":", 1)[1].replace("\\\n", " ").split()
    digest = hashlib.sha256("\0".join([_run([cxx, "--version"]), *flags]).encode())
    for path in sorted(includes):
        digest.update(Path(path).read_bytes())
    name = f"{source.parents[1].name}-{source.stem}-{sanitizer or 'plain'}"
    library = CACHE / f"{name}-{digest.hexdigest()[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    # Two test processes may want the same library: the second one waits for the first.
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = library.with_suffix(".partial")
            _run([cxx, *flags, str(source), "-o", str(partial), "-pthread"])
            partial.rename(library)
    return library


def load(cu_path: str | Path, defines: Mapping[str, str | int] | None = None) -> ctypes.CDLL:
    """Build without sanitizers and open the library."""
    return ctypes.CDLL(str(build(cu_path, None, defines)))


def configure(
    library: ctypes.CDLL, order: str = "forward", seed: int = 1, host_threads: int = 0
) -> None:
    """Choose the order in which threads and blocks run ("forward", "reverse", "shuffled") for later
    launches."""
    library.simt_configure(ORDERS[order], seed, host_threads)


def limit_shared(library: ctypes.CDLL, kibibytes: int = 0) -> None:
    """Dynamic shared memory that later launches may ask for, as a device would say (227 on sm_90);
    0: the 99 KiB of sm_120."""
    library.simt_limit_shared(ctypes.c_size_t(kibibytes * 1024))


class Counts(NamedTuple):
    """What launches did, all blocks together: block barriers passed, and bytes that cp.async
    read."""

    launches: int
    most_shared_bytes: int
    barriers: int
    async_bytes: int


def take_counts(library: ctypes.CDLL) -> Counts:
    """The counts since the last call."""
    numbers = (ctypes.c_uint64 * len(Counts._fields))()
    library.simt_take_counts(numbers)
    return Counts(*numbers)


def run_sanitized(
    arguments: Sequence[str], sanitizer: str, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` in a child with the sanitizer's runtime loaded first; its findings
    end it with SANITIZER_STATUS.

    The child sees the repository root on PYTHONPATH; import numpy and ctypes there, not torch
    (slow, and it is not instrumented).
    """
    runtime = _run([compiler(), f"-print-file-name={_RUNTIME[sanitizer]}"]).strip()
    env = dict(os.environ)
    env["LD_PRELOAD"] = str(Path(runtime).resolve())
    env["PYTHONPATH"] = str(ROOT)
    env["OPENBLAS_NUM_THREADS"] = "1"
    env["ASAN_OPTIONS"] = (
        f"detect_leaks=0:detect_stack_use_after_return=0:exitcode={SANITIZER_STATUS}"
    )
    env["UBSAN_OPTIONS"] = f"print_stacktrace=1:exitcode={SANITIZER_STATUS}"
    env["TSAN_OPTIONS"] = f"halt_on_error=1:exitcode={SANITIZER_STATUS}:report_signal_unsafe=0"
    return subprocess.run(
        [sys.executable, *arguments],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


if __name__ == "__main__":
    print(build(sys.argv[1], *sys.argv[2:3]))
