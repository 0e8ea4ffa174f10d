"""What nvcc makes of every kernel in csrc/*/cuda, on each shipped architecture, without a GPU.

    python -m tests.gates.cuda_gate [op ...]    compiles the named ops (none: those whose sources
    changed) and writes cuda_gate.json

As in setup.py, one front-end pass for compute_80 serves all architectures; ptxas then runs for
each. The table holds, for each kernel: registers, bytes of stack and of spills, and how many
instructions use the tensor cores (HMMA), load operands for them (LDSM), copy to shared memory
asynchronously (LDGSTS) and bring a warp together (WARPSYNC); the same of its longest loop with
tensor-core instructions, whose length is what a step costs, and of the next one where blocks do one
of two things.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TABLE = Path(__file__).with_suffix(".json")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS", "WARPSYNC")
LOOPS = ("loop", "next_loop")
OF_TWO_KINDS = ("masked_attention_bwd_kernel",)
_USAGE = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) "
    r"bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([^;]*);")


class ToolError(RuntimeError):
    """A tool is missing, or refused its input."""


def tool(name: str) -> str:
    """The path of nvcc or cuobjdump: from CUDA_HOME, PATH, nvcc's own folder, or the triton
    wheel."""
    folders = [str(Path(os.environ["CUDA_HOME"]) / "bin")] if "CUDA_HOME" in os.environ else []
    folders += os.environ.get("PATH", "").split(os.pathsep)
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise ToolError(
            f"{name} was not found (install the CUDA "
            f"toolkit{'' if name == 'nvcc' else ' or triton'})"
        )
    return found


def run(command: Sequence[str | Path]) -> str:
    """stdout and stderr of a command that must succeed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolError(f"{command[0]} failed:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", run([tool("nvcc"), "--version"]))[1]


def ops() -> list[str]:
    return sorted(path.parents[1].name for path in CSRC.glob("*/cuda/launch.cu"))


def sources(op: str) -> list[Path]:
    """The op's launch.cu and every file of csrc that it includes, however indirectly."""
    found: list[Path] = []
    waiting = [CSRC / op / "cuda" / "launch.cu"]
    while waiting:
        path = waiting.pop().resolve()
        if path in found or not path.exists():
            continue  # a header of CUDA or of the executor
        found.append(path)
        waiting += [path.parent / name for name in _INCLUDE.findall(path.read_text())]
    return sorted(found)


def digest(op: str) -> str:
    """Of the code that the op's kernels are made of; comments, layout and the places of files do
    not count."""
    total = hashlib.sha256()
    for path in sorted(sources(op), key=lambda path: path.name):
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        code = re.sub(r'#include "[^"]*"', "", code)
        total.update("".join(code.split()).encode())
    return total.hexdigest()[:12]


def readable(names: Sequence[str]) -> list[str]:
    """Kernel names without namespaces, casts and argument lists."""
    filt = shutil.which("c++filt")
    if filt is None:
        raise ToolError("c++filt was not found (install binutils)")
    text = subprocess.run(
        [filt], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    cleaned = []
    for line in text.splitlines():
        line = re.sub(r"\((?:int|bool|unsigned int|anonymous namespace)\)", "", line)
        line = re.sub(r"\b[a-z_0-9]+::|::", "", line.removeprefix("void "))
        cleaned.append(re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", line).replace(" >", ">").strip())
    return cleaned


def assemble(ptx: Path, architecture: str) -> dict[str, dict[str, int]]:
    """kernel -> registers, stack, spills and instruction counts on one architecture."""
    cubin = ptx.with_suffix(f".{architecture}.cubin")
    usage = run(
        [tool("nvcc"), f"-arch={architecture}", "-cubin", "--resource-usage", ptx, "-o", cubin]
    )
    rows = {}
    for mangled, stack, stores, loads, registers in _USAGE.findall(usage):
        rows[mangled] = {
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
        }
    for listing in run([tool("cuobjdump"), "-sass", cubin]).split("Function : ")[1:]:
        mangled, _, body = listing.partition("\n")
        lines = [(int(at, 16), name, rest) for at, name, rest in _LINE.findall(body)]
        counts = Counter(name for _, name, _ in lines)
        rows[mangled.strip()].update({name: counts[name] for name in INSTRUCTIONS})
        count = 2 if any(name in mangled for name in OF_TWO_KINDS) else 1
        for place, loop in zip(LOOPS, hot_loops(lines, count), strict=False):
            rows[mangled.strip()][place] = {
                "instructions": sum(loop.values()),
                **{name: loop[name] for name in ("HMMA", "LDSM")},
            }
    names = readable(list(rows))
    if len(set(names)) != len(names):
        raise ToolError("two kernels have the same readable name")
    return dict(sorted(zip(names, rows.values(), strict=True)))


def hot_loops(lines: Sequence[tuple[int, str, str]], count: int = 1) -> list[Counter[str]]:
    """Instructions of the longest `count` loops that use the tensor cores, none within another:
    from the target of a backward branch to the branch.

    Of a kernel with two kinds of blocks, a branch across the end of the kernel is no loop: one kind
    returns from code that was put behind the end.
    """
    found: list[tuple[int, int, Counter[str]]] = []
    for end, name, rest in lines:
        target = re.search(r"\b0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target is None or int(target[1], 16) >= end:
            continue
        start = int(target[1], 16)
        body = Counter(n for at, n, _ in lines if start <= at <= end)
        if body["HMMA"] and (count == 1 or not body["EXIT"]):
            found.append((start, end, body))
    apart: list[tuple[int, int, Counter[str]]] = []
    for start, end, body in sorted(found, key=lambda loop: -loop[2].total()):
        if all(end < other[0] or start > other[1] for other in apart):
            apart.append((start, end, body))
    return [body for _, _, body in apart[:count]]


def compile_op(
    op: str, architectures: Sequence[str] = ARCHITECTURES
) -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> kernel -> row, with two ptxas runs at a time."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / f"{op}.ptx"
        run(
            [
                tool("nvcc"),
                "-std=c++17",
                "-O3",
                "-arch=compute_80",
                "-ptx",
                CSRC / op / "cuda" / "launch.cu",
                "-o",
                ptx,
            ]
        )
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return dict(
                zip(architectures, pool.map(lambda a: assemble(ptx, a), architectures), strict=True)
            )


def read() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": "", "ops": {}}


def write(table: dict[str, Any]) -> None:
    """One line per kernel, so that a change is a readable diff."""
    lines = ["{", f'  "nvcc": {json.dumps(table["nvcc"])},', '  "ops": {']
    for i, (op, entry) in enumerate(sorted(table["ops"].items())):
        lines += [f"    {json.dumps(op)}: {{", f'      "code": {json.dumps(entry["code"])},']
        for j, architecture in enumerate(ARCHITECTURES):
            rows = [
                f"        {json.dumps(kernel)}: {json.dumps(row)}"
                for kernel, row in entry[architecture].items()
            ]
            comma = "," if j + 1 < len(ARCHITECTURES) else ""
            lines += [f'      "{architecture}": {{', ",\n".join(rows), f"      }}{comma}"]
        lines.append("    }" + ("," if i + 1 < len(table["ops"]) else ""))
    TABLE.write_text("\n".join([*lines, "  }", "}"]) + "\n")


def main(wanted: Sequence[str]) -> None:
    """Bring the table up to date."""
    table, version = read(), nvcc_version()
    stale = [
        op
        for op in ops()
        if table["nvcc"] != version or table["ops"].get(op, {}).get("code") != digest(op)
    ]
    table["nvcc"] = version
    table["ops"] = {op: entry for op, entry in table["ops"].items() if op in ops()}
    for op in [*wanted] or stale:
        print(f"compiling {op}", flush=True)
        table["ops"][op] = {"code": digest(op), **compile_op(op)}
    write(table)


if __name__ == "__main__":
    main(sys.argv[1:])
