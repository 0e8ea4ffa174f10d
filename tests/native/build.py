"""Builds an op's CPU kernels with g++ alone: one object for each of its sources and, where setup.py
builds a source once per instruction set, for each of these."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SHIM = Path(__file__).with_name("emulate_avx512.h")
BASE_FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-parameter",
]

_spec = importlib.util.spec_from_file_location("jepa_kernels_setup", ROOT / "setup.py")
assert _spec is not None and _spec.loader is not None
_setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_setup)

ISAS = {name: number for number, name in enumerate(_setup.ISAS)}  # jk_isa


class Unit(NamedTuple):
    """A source to build, for an instruction set where `isa` is not empty."""

    source: Path
    isa: str
    flags: list[str]

    @property
    def name(self) -> str:
        return f"{self.source.stem}-{self.isa}" if self.isa else self.source.stem

    def emulated(self) -> Unit:
        """The same on any x86-64 with AVX2: SIMDe in the place of AVX-512, and launch.cpp offers
        what is emulated."""
        if self.source.stem == "launch":
            return self._replace(flags=[*self.flags, f"-DJK_EMULATED_ISA={ISAS['avx512_bf16']}"])
        if "avx512" not in self.isa:
            return self
        flags = [f"-DJK_KERNEL_ISA={ISAS[self.isa]}", *_setup.ISAS["avx2"].split()]
        return self._replace(flags=[*flags, "-Wno-psabi", "-include", str(SHIM)])


def units(op: str, csrc: Path = CSRC) -> list[Unit]:
    """What csrc/<op>/cpu is built from; `csrc` may be a copy."""
    return [
        Unit(source, isa, flags.split())
        for source in sorted((csrc / op / "cpu").glob("*.cpp"))
        for isa, flags in _setup.kernel_builds(source).items()
    ]


def make(command: list[str], target: Path) -> Path:
    """Compiles or links `target` unless it is there."""
    if not target.exists():
        partial = target.with_suffix(".partial")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(target)  # a half-written file is never used
    return target


def _included(command: list[str]) -> list[Path]:
    """The source of a compilation and every file that it includes, system headers aside."""
    rule = subprocess.run([*command, "-MM"], check=True, capture_output=True, text=True).stdout
    return sorted(map(Path, rule.split(":", 1)[1].replace("\\\n", " ").split()))


def library(
    name: str,
    folder: Path,
    parts: Iterable[Unit],
    flags: Callable[[Unit], list[str]],
    link_flags: Iterable[str] = (),
) -> Path:
    """A shared library of `parts`, kept in `folder` by the hash of what it is made of."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(unit: Unit) -> Path:
        command = ["g++", *BASE_FLAGS, *flags(unit), *unit.flags, str(unit.source)]
        digest = hashlib.sha256(" ".join(command[:-1]).encode())
        for path in _included(command):
            digest.update(path.read_bytes())
        return make([*command, "-c"], folder / f"{name}-{unit.name}-{digest.hexdigest()[:16]}.o")

    with ThreadPoolExecutor(2) as pool:
        objects = list(map(str, pool.map(compile_one, parts)))
    digest = hashlib.sha256(" ".join(objects).encode()).hexdigest()[:16]
    return make(["g++", "-shared", *link_flags, *objects], folder / f"{name}-{digest}.so")
