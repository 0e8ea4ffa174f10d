"""Reads damaged files in a child process, and says which made a reader do anything but read or
refuse."""

from __future__ import annotations

import logging
import os
import random
import resource
import select
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av.logging

from tests.reliability.mutations import mutated
from tests.reliability.readers import READERS, REFUSALS, SHARES

# Longer than this for one small file is a hang.
LIMIT_S = 30.0
MEMORY = 6 << 30


@dataclass
class Findings:
    """How many inputs were read and refused, by reader, and what went wrong for the others."""

    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        return self.read.total() + self.refused.total() + len(self.faults)


def run(start: int, stop: int, seed: int = 0) -> Findings:
    """Inputs `start` .. `stop` - 1 of a seed: each depends on the seed and its number alone."""
    findings = Findings()
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as name:
        folder = Path(name)
        _quiet()
        sound = {kind: _sound(kind, folder) for kind in READERS}
        while start < stop:
            start = _in_child(start, stop, seed, folder, sound, findings)
    return findings


def reproduce(number: int, seed: int = 0) -> None:
    """Reads one input in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sound = {kind: _sound(kind, folder) for kind in READERS}
        print(_read_one(number, seed, folder, sound))


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _quiet() -> None:
    logging.disable(logging.CRITICAL)
    av.logging.set_level(None)
    warnings.simplefilter("ignore")


def _sound(kind: str, folder: Path) -> list[Path]:
    place = folder / kind / "sound"
    place.mkdir(parents=True)
    return list(READERS[kind].sound(place))


def _read_one(number: int, seed: int, folder: Path, sound: dict[str, list[Path]]) -> str:
    """`read` or `refused` and the reader."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    chosen, other = rng.choice(sound[kind]), rng.choice(sound[kind])
    path = folder / kind / chosen.name
    path.write_bytes(mutated(chosen.read_bytes(), rng, other.read_bytes()))
    try:
        READERS[kind].read(path, rng.random())
    except REFUSALS as error:
        if not str(error) or len(str(error)) > 2000:
            raise AssertionError(f"no sentence: {str(error)[:200]!r}") from error
        return f"refused {kind}"
    return f"read {kind}"


def _in_child(
    start: int,
    stop: int,
    seed: int,
    folder: Path,
    sound: dict[str, list[Path]],
    findings: Findings,
) -> int:
    """Goes on from `start` in a fork; returns the number to go on from when it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _work(start, stop, seed, folder, sound, writer)
    os.close(writer)
    number, pending = start, b""
    while True:
        ready, _, _ = select.select([reader], [], [], LIMIT_S)
        chunk = os.read(reader, 1 << 16) if ready else b""
        if not chunk:
            break
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            _note(line.decode(), number, findings)
            number += 1
    hung = not ready
    if hung:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if number < stop:
        how = f"no answer in {LIMIT_S:g} s" if hung else f"ended with status {status}"
        if os.WIFSIGNALED(status) and not hung:
            how = f"died of {signal.Signals(os.WTERMSIG(status)).name}"
        _note(f"fault {how}", number, findings)
        number += 1
    return number


def _note(line: str, number: int, findings: Findings) -> None:
    outcome, _, rest = line.partition(" ")
    if outcome == "fault":
        findings.faults.append({"input": number, "what": rest})
    else:
        {"read": findings.read, "refused": findings.refused}[outcome][rest] += 1


def _work(
    start: int, stop: int, seed: int, folder: Path, sound: dict[str, list[Path]], writer: int
) -> None:
    # A size that a damaged header invents is then a MemoryError and not the machine's end.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    code = 1
    try:
        for number in range(start, stop):
            try:
                line = _read_one(number, seed, folder, sound)
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                told = " ".join(str(error).split())[:200]
                where = f"{Path(place.filename).name}:{place.lineno}"
                line = f"fault {type(error).__name__} at {where}: {told}"
            os.write(writer, line.encode(errors="replace") + b"\n")
        code = 0
    finally:
        os._exit(code)


def timed(start: int, stop: int, seed: int = 0) -> tuple[Findings, float]:
    began = time.perf_counter()
    return run(start, stop, seed), time.perf_counter() - began
