"""What a rented GPU is asked, in three commands of at most 200 s: check, time, test.

    python -m benchmarks.gpu_run check    build; every op, backend, dtype, direction against float64
    python -m benchmarks.gpu_run time     seconds under CUDA-graph replay, ours and everyone else's
    python -m benchmarks.gpu_run test     device tests, sanitizers, whole steps by the sweep

The commands need neither one another nor a network. Each step writes its log as it runs, its
records as they are made, and its exit status as it ends, all under ``$OUT/<command>``; so a kill at
any second leaves what was done, and the same command goes on where it was stopped. ``--dry`` asks
the same questions of a CPU, a few seconds each. `benchmarks.gpu_records` turns ``$OUT`` into
committed records.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jepa import atomic

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 200.0  # of one command
_SHORTEST_S = 3.0  # with less time than this left, no step is started


@dataclass(frozen=True)
class Step:
    """One process of a command: resumable, or short."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    after: tuple[str, ...] = ()  # steps that must have ended, however they ended
    alone: bool = False  # what is timed shares the machine with nothing
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen[bytes]
    began: float
    stops: float


def status_of(folder: Path, step: str) -> dict[str, object] | None:
    """The record of a step that has ended, or None."""
    path = folder / f"{step}.status.json"
    return json.loads(path.read_text()) if path.exists() else None


def _die_with_parent() -> None:
    # Linux only: a step must not outlive a killed command, and hold the GPU for the next one.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _start(step: Step, folder: Path, stops: float) -> _Running:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    with open(folder / f"{step.name}.log", "ab") as log:
        log.write(f"$ {' '.join(step.command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    now = time.monotonic()
    return _Running(step, process, now, min(now + step.limit_s, stops))


def _record(step: Step, folder: Path, status: str, code: int | None, seconds: float) -> None:
    row = {
        "step": step.name,
        "command": list(step.command),
        "status": status,
        "exit": code,
        "seconds": round(seconds, 2),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    atomic.write_text(folder / f"{step.name}.status.json", json.dumps(row) + "\n")
    print(f"{step.name:24} {status} (exit {code}) after {seconds:.1f} s", flush=True)


def _stop(running: _Running) -> None:
    """Ends a step and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()


def run(
    steps: Sequence[Step], folder: Path, *, limit_s: float = LIMIT_S, beside: int | None = None
) -> bool:
    """Runs the steps that have not succeeded yet, in order, as many side by side as `beside` says.

    Args:
        steps: most valuable first; names are unique.
        folder: gets ``<step>.log`` (as it runs) and ``<step>.status.json`` (as it ends).
        limit_s: seconds for all; a step still running then is ended and recorded as such.
        beside: default: one for each core.

    Returns:
        True if every step has succeeded, now or in an earlier run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = len(os.sched_getaffinity(0)) if beside is None else beside
    stops = time.monotonic() + limit_s
    ended = {s.name for s in steps if (status_of(folder, s.name) or {}).get("status") == "ok"}
    succeeded = set(ended)
    waiting = [step for step in steps if step.name not in ended]
    running: list[_Running] = []
    try:
        while waiting or running:
            now = time.monotonic()
            for item in list(running):
                late = now > item.stops
                if item.process.poll() is None and not late:
                    continue
                status = "ok" if item.process.returncode == 0 else "failed"
                if item.process.returncode is None:
                    status = "out of time"
                _stop(item)
                seconds = time.monotonic() - item.began
                _record(item.step, folder, status, item.process.returncode, seconds)
                running.remove(item)
                ended.add(item.step.name)
                if status == "ok":
                    succeeded.add(item.step.name)
            if now > stops - _SHORTEST_S and waiting:
                print(f"no time left for: {', '.join(step.name for step in waiting)}", flush=True)
                waiting.clear()
            for step in _ready(waiting, ended, running, beside):
                waiting.remove(step)
                if shutil.which(step.command[0]) is None:
                    _record(step, folder, f"{step.command[0]} is not here", None, 0.0)
                    ended.add(step.name)
                    continue
                running.append(_start(step, folder, stops))
            time.sleep(0.02)
    finally:
        for item in running:
            _stop(item)
    return succeeded == {step.name for step in steps}


def _ready(
    waiting: Sequence[Step], ended: set[str], running: Sequence[_Running], beside: int
) -> list[Step]:
    """What may start now. A step that must be alone holds back those after it, not those before."""
    chosen: list[Step] = []
    if any(item.step.alone for item in running):
        return chosen
    for step in waiting:
        if len(running) + len(chosen) >= beside:
            break
        if not set(step.after) <= ended:
            continue
        if step.alone:
            if running or chosen:
                break
            return [step]
        chosen.append(step)
    return chosen


def _python(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", *(str(a) for a in arguments))


def _shares(count: int) -> list[str]:
    return [f"{i}/{count}" for i in range(count)]


def check_steps(folder: Path, dry: bool, cores: int) -> list[Step]:
    """(a) Does it build, and is every kernel right?"""
    device = "cpu" if dry else "cuda"
    script = ("benchmarks.gpu_check", "--device", device, "--output", folder / "checks.jsonl")
    if dry:
        command = _python(*script, "--limit", 12)
        return [
            Step("doctor", _python("jepa_kernels", "doctor"), 60),
            *(Step(f"cpu-{s[0]}", (*command, "--share", s), 60) for s in _shares(2)),
        ]
    steps = [Step("build", _python("benchmarks.gpu_build"), 150)]
    # Triton compiles while nvcc does: its kernels need nothing of the native library.
    for backend, after in (("triton", ()), ("flash", ()), ("cuda", ("build",))):
        for share in _shares(max(2, cores // 2)):
            name = f"{backend}-{share.split('/')[0]}"
            command = _python(*script, "--backend", backend, "--share", share)
            steps.append(Step(name, command, 180, after=after))
    return [*steps, Step("doctor", _python("jepa_kernels", "doctor"), 60, after=("build",))]


TOPICS = ("attention", "lists", "rollout", "gaussianity", "patches")


def time_steps(folder: Path, dry: bool, cores: int) -> list[Step]:
    """(b) How fast is it, against whom?"""
    device = "cpu" if dry else "cuda"
    script = ("benchmarks.gpu_time", "--device", device, *(["--quick"] if dry else []))
    shares = _shares(1 if dry else max(2, cores // 2))
    warm = [
        Step(f"warm-{s.split('/')[0]}", _python(*script, "--warm", "--share", s), 90)
        for s in shares
    ]
    names = tuple(step.name for step in warm)
    limits = {"attention": 120, "lists": 60, "rollout": 90, "gaussianity": 45, "patches": 45}
    return [
        *warm,
        *(
            Step(
                topic,
                _python(*script, "--topic", topic, "--output", folder / f"{topic}.jsonl"),
                limits[topic],
                after=names,
                alone=True,
            )
            for topic in TOPICS
        ),
    ]


# Side by side, every process must not take every core for its float64 reference.
_FEW_THREADS = {"OMP_NUM_THREADS": "2"}
# Sanitizers look at single allocations: torch's caching allocator would hide an overrun in a block.
_UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_steps(folder: Path, dry: bool, cores: int) -> list[Step]:
    """(c) Does all of it hold, and what does a training step gain?"""
    shares = _shares(2 if dry else max(2, cores // 2))
    # Device tests first. Other folders import what a rented machine may lack.
    chosen = ["tests/ops/test_device.py", *([] if dry else ["tests/ops", "-m", "gpu"])]
    steps = []
    for share in shares:
        name = f"tests-{share.split('/')[0]}"
        outcomes = f"--outcomes={folder / f'{name}.jsonl'}"
        command = _python(
            "pytest", *chosen, "-p", "benchmarks.gpu_outcomes", outcomes, f"--share={share}"
        )
        steps.append(Step(name, command, 150, environment=_FEW_THREADS))
    sweep = ("benchmarks.sweep", "--modes", "pretrain", "--data", "tensors", "--no-report")
    if dry:
        small = ("--variants", "baseline", "--resolutions", "32", "--frames", "8", "--rounds", "1")
        record = ("--budget", "20", "--output", folder / "sweep_micro.json")
        return [*steps, Step("sweep_micro", _python(*sweep, *small, *record), 60, alone=True)]
    first = tuple(step.name for step in steps)
    for size, budget in (("base", 55), ("large", 55)):
        command = _python(
            *sweep,
            *("--size", size, "--resolutions", "112,224,384", "--dtype", "bf16", "--batch", "8"),
            *("--device", "cuda", "--budget", budget, "--output", folder / f"sweep_{size}.json"),
        )
        steps.append(Step(f"sweep_{size}", command, budget + 30, after=first, alone=True))
    for tool in ("memcheck", "racecheck"):
        # The tool's first failing launch ends the step; what it had checked stays in the records.
        # Every fifth check: of all ops, and of both directions in turn.
        checks = ("--backend", "cuda", "--output", folder / f"{tool}.jsonl", "--share", "0/5")
        command = (
            *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"),
            *_python("benchmarks.gpu_check", "--device", "cuda", *checks),
        )
        steps.append(Step(f"sanitizer-{tool}", command, 90, after=first, environment=_UNCACHED))
    return steps


PARTS = {"check": check_steps, "time": time_steps, "test": test_steps}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--dry", action="store_true", help="on a CPU, a few seconds of each step")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"),
        help="default: $OUT, or runs/gpu",
    )
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds (default 200)")
    arguments = parser.parse_args(argv)
    folder = arguments.out.resolve() / arguments.part
    cores = len(os.sched_getaffinity(0))
    # Compiled Triton kernels outlive the command: the next one finds them.
    os.environ.setdefault("TRITON_CACHE_DIR", str(arguments.out.resolve() / "triton_cache"))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    began = time.monotonic()
    done = run(PARTS[arguments.part](folder, arguments.dry, cores), folder, limit_s=arguments.limit)
    print(f"{arguments.part}: {time.monotonic() - began:.0f} s; records: {folder}")
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
