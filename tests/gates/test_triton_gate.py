"""What ptxas makes of every shipped Triton kernel, on each architecture, without a GPU: registers,
spills, tensor-core instructions.

The committed table (triton_gate.json) has a row per kernel, dtype, head width and architecture.
Compiling all of it takes many minutes, so the test compiles a part, compares it with the table, and
fails when the kernels have changed since the table was written.

    python -m tests.gates.test_triton_gate    compiles the rows that are out of date and writes the
    table
"""

from __future__ import annotations

import ast
import concurrent.futures
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import jepa_kernels
from jepa_kernels import triton_runtime
from jepa_kernels.ops.masked_attention.triton import constants
from jepa_kernels.ops.masked_attention.triton_launch import launch_options
from jepa_kernels.ops.masked_attention.triton_table import (
    ROTATE_HEADS,
    ROTATE_TILE,
    Tile,
    channels,
    tile,
)
from jepa_kernels.rope3d import rope_dim
from jepa_kernels.testing import HEAD_DIMS
from tests.conftest import missing

TABLE = Path(__file__).with_name("triton_gate.json")
ARCHITECTURES = (80, 90, 100, 120)
# Shared memory of a block in bytes, and columns of tensor memory.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
TENSOR_MEMORY_LIMIT = 512
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PANELS = (
    "query",
    "key",
    "value",
    "out",
    "grad_out",
    "grad_query",
    "grad_key",
    "grad_value",
    "x",
    "rotated",
)
_SOURCES = (
    "triton_support.py",
    *(f"ops/masked_attention/triton_{name}.py" for name in ("tiles", "kernels", "kernels_bwd")),
)


@dataclass(frozen=True)
class Case:
    """One kernel as the launcher would compile it."""

    kernel: str
    dtype: torch.dtype
    head_dim: int
    architecture: int
    form: (
        str  # "packed", "dense" or "timed" (packed with times), with RoPE; "plain" is dense without
    )

    @property
    def name(self) -> str:
        return (
            f"{self.kernel} {_TYPES[self.dtype]} {self.head_dim} sm_{self.architecture} {self.form}"
        )

    @property
    def tile(self) -> Tile:
        return (
            ROTATE_TILE
            if self.kernel == "rotate"
            else tile(
                self.kernel, self.architecture, self.dtype, self.head_dim, self.form == "timed"
            )
        )


def cases() -> Iterator[Case]:
    for architecture in ARCHITECTURES:
        for kernel in ("fwd", "bwd_q", "bwd_kv"):
            for head_dim in HEAD_DIMS:
                yield Case(kernel, torch.bfloat16, head_dim, architecture, "packed")
                yield Case(kernel, torch.float32, head_dim, architecture, "packed")
            for head_dim in (32, 64, 128):
                yield Case(kernel, torch.float16, head_dim, architecture, "packed")
                yield Case(kernel, torch.bfloat16, head_dim, architecture, "dense")
                yield Case(kernel, torch.bfloat16, head_dim, architecture, "plain")
            for head_dim in (64, 88, 128):
                yield Case(kernel, torch.bfloat16, head_dim, architecture, "timed")
                yield Case(kernel, torch.float32, head_dim, architecture, "timed")
        for dtype in (torch.bfloat16, torch.float32):
            for head_dim in (32, 64, 88, 128):
                yield Case("rotate", dtype, head_dim, architecture, "dense")


def compiled_in_the_test(case: Case) -> bool:
    """A part that is quick and touches every kernel on every architecture, both dtype families and
    a head with a tail."""
    if case.form != "packed" or case.kernel == "rotate":
        return False
    hopper = case.architecture == 90
    return (case.dtype == torch.bfloat16 and case.head_dim == 64) or (
        hopper and case.head_dim == 88 and case.dtype == torch.bfloat16
    )


def report(case: Case) -> dict[str, Any]:
    """Compiles one case; the row of the table."""
    from jepa_kernels.ops.masked_attention import triton_kernels, triton_kernels_bwd
    from jepa_kernels.triton_offline import compile_report

    kernel = {
        "fwd": triton_kernels.masked_attention_fwd_kernel,
        "bwd_q": triton_kernels_bwd.masked_attention_bwd_q_kernel,
        "bwd_kv": triton_kernels_bwd.masked_attention_bwd_kv_kernel,
        "rotate": triton_kernels.rotate_rows_kernel,
    }[case.kernel]
    rope, times = case.form != "plain", case.form == "timed"
    packed = times or case.form == "packed"
    if case.kernel == "rotate":
        main, tail = channels(case.dtype, case.head_dim)
        fixed = {
            "HEAD_DIM": case.head_dim,
            "MAIN": main,
            "TAIL": tail,
            "ROPE_DIM": rope_dim(case.head_dim),
            "ALIGN": 8,
            "BLOCK": case.tile.block_q,
            "HEADS_EACH": ROTATE_HEADS,
        }
    else:
        fixed = constants(case.dtype, case.head_dim, rope, packed, times, 8, 1, case.tile)
        if case.kernel == "fwd":
            fixed["NEGATIVE"] = False
    absent = [
        *(() if rope else ("query_ids", "key_ids", "table")),
        *(() if packed else ("cu_q", "cu_k")),
        *(() if times else ("query_times", "key_times")),
    ]
    fixed |= {name: None for name in absent if name in kernel.arg_names}
    types = {name: _type(name, case.dtype) for name in kernel.arg_names if name not in fixed}
    found = compile_report(kernel, case.architecture, types, fixed, launch_options(case.tile))
    return {**expected(case), **found.as_dict()}


def _type(name: str, dtype: torch.dtype) -> str:
    if name in _PANELS:
        return f"*{_TYPES[dtype]}"
    if name in ("lse", "log2_lse", "delta", "table"):
        return "*fp32"
    if name in ("query_ids", "key_ids", "ids", "query_times", "key_times"):
        return "*i64"
    if name in ("cu_q", "cu_k"):
        return "*i32"
    return "fp32" if name in ("scale", "log2_scale") else "i32"


@functools.cache
def digest() -> str:
    """Of the syntax of the kernels: comments, docstrings and layout do not count."""
    package = Path(jepa_kernels.__file__).parent
    total = hashlib.sha256()
    for source in _SOURCES:
        tree = ast.parse((package / source).read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
                ast.get_docstring(node) is not None
            ):
                node.body = node.body[1:]
        total.update(ast.dump(tree).encode())
    return total.hexdigest()[:12]


def expected(case: Case) -> dict[str, Any]:
    """The part of a row that is known without compiling: a row that differs in it is out of
    date."""
    return {"code": digest(), "tile": list(case.tile)}


def triton_version() -> str:
    import triton

    return triton.__version__


def write() -> None:
    """Compiles the rows that are out of date, on two processes; an interrupted run goes on where it
    stopped."""
    table = (
        json.loads(TABLE.read_text())
        if TABLE.exists()
        else {"triton": triton_version(), "rows": {}}
    )
    old = table["rows"] if table["triton"] == triton_version() else {}
    rows = {
        case.name: old[case.name]
        for case in cases()
        if expected(case).items() <= old.get(case.name, {}).items()
    }
    todo = [case for case in cases() if case.name not in rows]
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        for case, row in zip(todo, pool.map(report, todo), strict=True):
            rows[case.name] = row
            print(case.name, row, flush=True)
            lines = ",\n".join(
                f"    {json.dumps(c.name)}: {json.dumps(rows[c.name])}"
                for c in cases()
                if c.name in rows
            )
            TABLE.write_text(
                f'{{\n  "triton": {json.dumps(triton_version())},\n  "rows": {{\n{lines}\n  '
                f"}}\n}}\n"
            )


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def sound(case: Case, row: dict[str, Any]) -> None:
    """What every row must satisfy, whatever Triton release compiled it."""
    assert row["stack_bytes"] == 0 and row["spill_instructions"] == 0, (
        f"{case.name} spills registers: {row}"
    )
    assert row["shared_bytes"] <= SHARED_LIMIT[case.architecture], (
        f"{case.name} needs more shared memory than a block has: {row}"
    )
    assert row["tensor_memory_columns"] <= TENSOR_MEMORY_LIMIT, (
        f"{case.name} needs more tensor memory than there is: {row}"
    )
    if case.kernel != "rotate":
        tensor_cores = case.dtype != torch.float32
        assert (row["tensor_core_instructions"] > 0) == tensor_cores, (
            f"{case.name} uses the wrong units: {row}"
        )


def test_the_table_is_complete_and_of_these_kernels(table):
    assert set(table["rows"]) == {case.name for case in cases()}
    stale = [
        case.name
        for case in cases()
        if not expected(case).items() <= table["rows"][case.name].items()
    ]
    assert not stale, (
        f"kernels or tiles have changed: run python -m tests.gates.test_triton_gate ({len(stale)} "
        f"rows, such as {stale[0]})"
    )


def test_no_row_spills_and_the_tensor_cores_are_used(table):
    for case in cases():
        sound(case, table["rows"][case.name])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiling_again_gives_the_table(table, architecture):
    if not triton_runtime.installed():
        missing("triton is not installed (pip install triton)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(
            "TRITON_INTERPRET=1 replaces the kernels by Python functions, which cannot be compiled"
        )
    for case in cases():
        if case.architecture == architecture and compiled_in_the_test(case):
            row = report(case)
            sound(case, row)
            if table["triton"] == triton_version():
                assert row == table["rows"][case.name], case.name


if __name__ == "__main__":
    write()
