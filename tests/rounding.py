"""The numeric parts of the suite under the rounding of other processors.

Environment variables make torch, MKL, oneDNN and this package's kernels use the instructions of
another processor, and so its order of summation.

    python -m tests.rounding                    every setting, every numeric part
    python -m tests.rounding --setting avx2     one setting
    python -m tests.rounding --turn --quick     one setting, chosen by the commit, on fewer tests
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from jepa_kernels import native

ROOT = Path(__file__).resolve().parents[1]

# By name. Together: torch's own kernels without vectors, with AVX2 and with what the processor has;
# MKL and oneDNN held to AVX2, oneDNN also to AVX-512 without bfloat16; one and two threads; each
# instruction set of this package's kernels.
SETTINGS: dict[str, dict[str, str]] = {
    "portable": {
        "ATEN_CPU_CAPABILITY": "default",
        "JEPA_KERNELS_ISA": "portable",
        "OMP_NUM_THREADS": "1",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "JEPA_KERNELS_ISA": "avx2",
        "OMP_NUM_THREADS": "2",
    },
    "avx512": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "JEPA_KERNELS_ISA": "avx512",
        "OMP_NUM_THREADS": "1",
    },
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "JEPA_KERNELS_ISA": "avx512_bf16",
        "OMP_NUM_THREADS": "2",
    },
}

# One process each, as in `make test`.
PARTS: tuple[tuple[str, ...], ...] = (
    ("-m", "pytest", "tests/jepa"),
    ("-m", "pytest", "tests/ops"),
    ("-m", "pytest", "tests/integrations"),
    ("-m", "pytest", "tests/nn", "tests/benchmarks/test_published_step.py"),
)
# What compares most numbers per second of testing: nothing that waits for a compiler or for other
# processes.
NOT_SLOW = ("-m", "not slow", "-k", "not compile and not inductor and not malformed and not fsdp")
QUICK: tuple[tuple[str, ...], ...] = (
    (
        "-m",
        "pytest",
        *(f"tests/jepa/test_{name}.py" for name in ("conformance", "models", "objectives", "step")),
        *NOT_SLOW,
    ),
    ("-m", "pytest", "tests/ops", *NOT_SLOW),
    ("-m", "pytest", "tests/nn", "tests/integrations", *NOT_SLOW),
)


def usable(setting: str) -> bool:
    """Whether this processor has the setting's instructions."""
    wanted = SETTINGS[setting]["JEPA_KERNELS_ISA"]
    return native.ISAS.index(wanted) <= torch.ops.jepa_kernels_native.cpu_isa()


def turn(commit: str, settings: Sequence[str]) -> str:
    """The setting whose turn it is at a commit (its hash, in hexadecimal digits)."""
    return settings[int(commit, 16) % len(settings)]


def commands(quick: bool) -> list[list[str]]:
    """The command of every part."""
    golden = ROOT.parent / "shared" / "golden"
    folder = golden if golden.is_dir() else ROOT / "tests" / "golden" / "published"
    parts = [*(QUICK if quick else PARTS), ("-m", "jepa.conformance", str(folder))]
    return [[sys.executable, *part] for part in parts]


def run(setting: str, quick: bool, jobs: int) -> bool:
    """Runs the parts under one setting, each printed when it is done. True when all pass."""
    variables = SETTINGS[setting]
    folder = tempfile.TemporaryDirectory(prefix=f"rounding_{setting}_")
    # Inductor's cache knows nothing of ATEN_CPU_CAPABILITY: code made for 16 lanes and built with
    # AVX2 adds up half of them.
    environment = {"TORCHINDUCTOR_CACHE_DIR": folder.name, **variables}
    print(f"rounding {setting}: {' '.join(f'{k}={v}' for k, v in variables.items())}", flush=True)

    def finished(command: list[str]) -> bool:
        start = time.monotonic()
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(
            f"rounding {setting}: {shlex.join(command[1:])}: exit {done.returncode}, "
            f"{time.monotonic() - start:.0f} s\n{done.stdout}",
            flush=True,
        )
        return done.returncode == 0

    with folder, ThreadPoolExecutor(jobs) as pool:
        return all(list(pool.map(finished, commands(quick))))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.rounding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--setting", choices=sorted(SETTINGS), help="this one alone")
    which.add_argument(
        "--turn", action="store_true", help="one, chosen by the hash of the checked-out commit"
    )
    parser.add_argument("--quick", action="store_true", help="the shorter tests of each part")
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time (default 2)")
    options = parser.parse_args(arguments)
    possible = [name for name in SETTINGS if usable(name)]
    for name in sorted(SETTINGS.keys() - set(possible)):
        print(f"rounding {name}: not run, this processor has no {name}")
    chosen = possible
    if options.setting is not None:
        if options.setting not in possible:
            return 2
        chosen = [options.setting]
    elif options.turn:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        chosen = [turn(commit, possible)]
        print(f"rounding: it is the turn of {chosen[0]} at commit {commit[:12]}")
    failed = [name for name in chosen if not run(name, options.quick, options.jobs)]
    print(f"rounding: {len(chosen)} settings run, failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
