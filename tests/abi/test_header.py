"""The ABI that tests read from params.h is the compiler's: sizes, offsets, constants; and what the
reader does not know it refuses."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from jepa_kernels import native
from tests.abi.header import CSRC, Abi, HeaderError, parse, read
from tests.native.build import ISAS
from tests.simt.build import compiler

OPS = sorted(path.parent.name for path in CSRC.glob("*/params.h"))


def facts(abi: Abi) -> dict[str, int]:
    """C expression -> its value as ctypes has it."""
    found = dict(abi.constants)
    for name, struct in abi.structs.items():
        found[f"sizeof({name})"] = ctypes.sizeof(struct)
        for entry in struct._fields_:
            found[f"offsetof({name}, {entry[0]})"] = getattr(struct, entry[0]).offset
            found[f"sizeof((({name}*)0)->{entry[0]})"] = getattr(struct, entry[0]).size
    return found


def compiled(header: Path, expressions: list[str], folder: Path) -> dict[str, int]:
    """The same expressions as the compiler evaluates them."""
    lines = "".join(f'  std::printf("%lld\\n", (long long)({e}));\n' for e in expressions)
    source = folder / "facts.cpp"
    source.write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "{header}"\nint main() {{\n{lines}}}\n'
    )
    program = folder / "facts"
    subprocess.run([compiler(), "-std=c++20", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return dict(zip(expressions, map(int, printed.split()), strict=True))


@pytest.mark.parametrize("op", OPS)
def test_sizes_offsets_and_constants_are_those_of_the_compiler(op, tmp_path):
    abi = read(op)
    assert abi.structs and abi.functions
    expected = facts(abi)
    assert compiled(CSRC / op / "params.h", list(expected), tmp_path) == expected


def test_a_difference_is_noticed(tmp_path):
    """A header whose struct has lost a field, against the compiler's view of the sound one."""
    header = CSRC / "ema_update" / "params.h"
    field = "  int64_t numel;\n"
    assert field in header.read_text()
    broken = facts(parse(Abi(), header.read_text().replace(field, "", 1), header.parent))
    assert compiled(header, list(broken), tmp_path) != broken


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("typedef struct { int64_t n[4]; } jk_x;", "cannot read"),
        ("typedef struct { unsigned n; } jk_x;", "unknown type unsigned"),
        ("typedef struct { int64_t n : 3; } jk_x;", "cannot read"),
        ("typedef struct { float** rows; } jk_x;", r"unknown type float\*\*"),
        ("struct jk_x { int64_t n; };", "expected typedef or enum or JK_EXPORT"),
        ("typedef struct { int64_t n; } ;", "expected a name"),
        ("enum jk_x { JK_A = JK_B };", "expected a number"),
        ("#if 1", "unknown directive"),
        ("#pragma pack(1)", "unknown directive"),
    ],
)
def test_what_the_reader_does_not_know_is_refused(text, reason):
    with pytest.raises(HeaderError, match=reason):
        parse(Abi(), text, CSRC)


def test_functions_and_callbacks_have_their_types():
    abi = read("ema_update")
    result, arguments = abi.functions["jk_ema_update_cpu_fwd"]
    params = abi.structs["jk_ema_update_params"]
    assert result is ctypes.c_char_p
    assert arguments == [
        ctypes.POINTER(params),
        ctypes.c_int,
        abi.callbacks["jk_parallel_for"],
    ]
    assert abi.constants["JK_ISA_AUTO"] == -1


def test_the_build_and_python_number_instruction_sets_as_the_abi_does():
    constants = read("masked_attention").constants
    names = {
        name.removeprefix("JK_ISA_").lower(): number
        for name, number in constants.items()
        if name.startswith("JK_ISA_") and name not in ("JK_ISA_AUTO", "JK_ISA_COUNT")
    }
    assert names == ISAS and tuple(names) == native.ISAS
    assert len(names) == constants["JK_ISA_COUNT"]
