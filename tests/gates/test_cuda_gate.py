"""CUDA compile gates: no kernel spills, tensor-core kernels use the tensor cores, and the committed
table says what nvcc makes of them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.conftest import missing
from tests.gates import cuda_gate

TABLE = cuda_gate.read()
REFRESH = "run python -m tests.gates.cuda_gate"
# Blocks of 128 threads, two on a multiprocessor: 65536 registers / 256.
MOST_REGISTERS = 255


def kernels(op: str) -> list[tuple[str, str, dict[str, int]]]:
    return [
        (a, name, row) for a in cuda_gate.ARCHITECTURES for name, row in TABLE["ops"][op][a].items()
    ]


def sound(kernel: str, row: dict[str, int]) -> None:
    """What every kernel must satisfy, whatever nvcc compiled it."""
    assert row["spills"] == 0, f"{kernel} spills registers: {row}"
    assert row["stack"] == 0, f"{kernel} keeps an array in memory: {row}"
    assert row["registers"] <= MOST_REGISTERS, f"{kernel}: {row}"
    if kernel.startswith("latent_rollout"):
        assert row["LDGSTS"] > 0, f"{kernel} does not load its matrices asynchronously: {row}"
        for instruction in ("HMMA", "LDSM"):
            assert (row[instruction] > 0) == (not kernel.endswith("<float>")), (
                f"{kernel} uses the wrong units: {row}"
            )
    if kernel.startswith("visible_patch_embed") and "scatter" not in kernel:
        for instruction in ("HMMA", "LDSM"):
            assert (row[instruction] > 0) == (not kernel.endswith("<float>")), (
                f"{kernel} uses the wrong units: {row}"
            )
    if not kernel.startswith(("masked_attention_fwd", "masked_attention_bwd")):
        return
    assert row["LDGSTS"] > 0, f"{kernel} does not load asynchronously: {row}"
    for instruction in ("HMMA", "LDSM"):
        assert (row[instruction] > 0) == ("float_kernel" not in kernel), (
            f"{kernel} uses the wrong units: {row}"
        )


def recompile(op: str, architectures: tuple[str, ...]) -> None:
    for name in ("nvcc", "cuobjdump"):
        try:
            cuda_gate.tool(name)
        except cuda_gate.ToolError as reason:
            missing(str(reason))
    same_compiler = cuda_gate.nvcc_version() == TABLE["nvcc"]
    for architecture, rows in cuda_gate.compile_op(op, architectures).items():
        expected: dict[str, Any] = TABLE["ops"][op][architecture]
        assert rows.keys() == expected.keys(), f"the kernels have changed: {REFRESH}"
        for kernel, row in rows.items():
            sound(kernel, row)
            if same_compiler:
                assert row == expected[kernel], f"{kernel} on {architecture}: {REFRESH}"


def test_the_code_of_an_op_is_everything_it_includes() -> None:
    names = {path.name for path in cuda_gate.sources("adamw_ema")}
    assert {"launch.cu", "step.h", "lanes.h", "launch.h", "device.cuh"} <= names


def test_every_op_is_in_the_table() -> None:
    assert sorted(TABLE["ops"]) == cuda_gate.ops(), f"csrc/*/cuda/launch.cu has changed: {REFRESH}"


@pytest.mark.parametrize("op", sorted(TABLE["ops"]))
def test_the_table_is_of_this_code(op: str) -> None:
    assert TABLE["ops"][op]["code"] == cuda_gate.digest(op), (
        f"the sources of {op} have changed: {REFRESH}"
    )
    for architecture in cuda_gate.ARCHITECTURES:
        assert TABLE["ops"][op][architecture], f"{op} has no kernel on {architecture}"
    for _, kernel, row in kernels(op):
        sound(kernel, row)


def test_masked_attention_has_a_row_for_every_class_and_type() -> None:
    for architecture in cuda_gate.ARCHITECTURES:
        rows = TABLE["ops"]["masked_attention"][architecture]
        for kind, classes in (("<bfloat16", 5), ("<float16", 5)):
            for kernel in ("fwd", "bwd"):
                found = [
                    name
                    for name in rows
                    if name.startswith(f"masked_attention_{kernel}_kernel{kind}")
                ]
                timed = [name for name in found if "Timed<" in name]
                assert len(timed) == classes, (architecture, kernel, kind)
                assert len(found) == 2 * classes, (architecture, kernel, kind)
        assert len([name for name in rows if "float_kernel" in name]) == 2 * 6, architecture


def test_kernels_with_times_multiply_as_often_as_those_without() -> None:
    """Masks and skipped steps add no products, and of the loads of operands only what heads of 64
    channels cannot keep in registers."""
    rows = {(a, name): row for a, name, row in kernels("masked_attention")}
    timed = [key for key in rows if "Timed<" in key[1]]
    assert timed
    for a, name in timed:
        row, plain = rows[a, name], rows[a, re.sub(r"Timed<(\w+<[^>]*>)>", r"\1", name)]
        assert row["HMMA"] == plain["HMMA"], name
        assert row["LDSM"] == plain["LDSM"] or "BackwardTile<64," in name, name
        assert row["LDSM"] <= 0.45 * row["HMMA"] or row["LDSM"] == plain["LDSM"], name


def test_a_warp_is_together_before_ldmatrix() -> None:
    """Matrices of odd width are loaded element by element, in branches that differ by lane: the
    ldmatrix that follows needs a barrier of the warp, of which 10 were there without."""
    for kernel, row in TABLE["ops"]["latent_rollout"]["sm_90a"].items():
        assert kernel.endswith("<float>") or row["WARPSYNC"] >= 12, (kernel, row)


# Most instructions of a step, and LDSM for each HMMA, of 16-bit kernels on Hopper. A step makes 64
# scores of a lane in fwd, 32 in the others; what only the first step loads counts.
# The eight warps of a multiprocessor take 12.8 clocks of its tensor cores for an HMMA each and 32
# of its shared memory for an LDSM: from 0.4 on memory is the bound.
# Of the backward kernel's two loops the longer one is of blocks that own keys where heads have 64
# channels. Elsewhere it is of blocks that own queries, which make 64 scores at a time or have wide
# heads.
LOOPS = {
    ("fwd", 64, "loop"): (770, 0.35),
    ("bwd", 64, "loop"): (440, 0.4),
    ("bwd", 64, "next_loop"): (410, 0.45),
    ("bwd", 32, "loop"): (600, 0.35),
    ("bwd", 32, "next_loop"): (340, 0.4),
    ("bwd", 96, "loop"): (580, 0.45),
    ("bwd", 96, "next_loop"): (370, 0.65),
}


@pytest.mark.parametrize(("kind", "channels", "place"), LOOPS)
def test_inner_loops_stay_within_their_budget(kind: str, channels: int, place: str) -> None:
    instructions, ratio = LOOPS[kind, channels, place]
    rows = [
        row
        for name, row in TABLE["ops"]["masked_attention"]["sm_90a"].items()
        if name.startswith(f"masked_attention_{kind}_kernel<")
        and f"Tile<{channels}," in name
        and "Timed<" not in name
    ]
    assert len(rows) == 2, "bfloat16 and float16"
    for row in rows:
        loop = row[place]
        assert loop["instructions"] <= instructions, loop
        assert loop["LDSM"] <= ratio * loop["HMMA"], loop


def test_a_spill_or_a_lost_instruction_is_refused() -> None:
    name, row = next(
        (n, r)
        for _, n, r in kernels("masked_attention")
        if n.startswith("masked_attention_fwd_kernel")
    )
    sound(name, row)
    for change in ({"spills": 8}, {"stack": 16}, {"HMMA": 0}, {"LDSM": 0}, {"LDGSTS": 0}):
        with pytest.raises(AssertionError, match="masked_attention_fwd_kernel"):
            sound(name, {**row, **change})


@pytest.mark.parametrize("op", sorted(TABLE["ops"]))
def test_compiling_again_gives_the_table(op: str) -> None:
    recompile(op, ("sm_90a",))


@pytest.mark.nightly
@pytest.mark.parametrize("op", sorted(TABLE["ops"]))
def test_compiling_again_gives_the_table_on_the_other_architectures(op: str) -> None:
    recompile(op, tuple(a for a in cuda_gate.ARCHITECTURES if a != "sm_90a"))
