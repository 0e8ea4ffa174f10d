"""Compiles a Triton kernel for a GPU that is not there, and reads what the assembler made of it.
Imports triton when called.

The triton wheel carries ptxas, cuobjdump and nvdisasm, so neither a GPU nor a CUDA toolkit is
needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# One tensor-core instruction of each generation: Ampere and consumer Blackwell, Hopper, data-centre
# Blackwell.
_TENSOR_CORE = re.compile(r"\b(HMMA|IMMA|HGMMA|UTC\w*MMA)\b")
_LOCAL_MEMORY = re.compile(r"\b(STL|LDL)\b")


@dataclass(frozen=True)
class Report:
    """Resources of one compiled kernel on one architecture."""

    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    tensor_memory_columns: int
    tensor_core_instructions: int
    float_instructions: int
    instructions: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def compile_report(
    kernel: Any,
    architecture: int,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Report:
    """Compiles `kernel` for ``sm_<architecture>`` and reports registers, spills and instruction
    counts.

    Args:
        kernel: a ``@triton.jit`` function.
        architecture: 80, 90, 100 or 120.
        types: type of every argument that is not a constant, such as ``{"query": "*bf16", "scale":
            "fp32", "rows": "i32"}``. Pointers are taken to be 16-byte aligned, which is what the
            launcher finds at run time.
        constants: value of every ``tl.constexpr`` argument; also None for a pointer that is absent.
        options: launch options: num_warps, num_stages, maxnreg, enable_fp_fusion.

    Raises:
        ImportError: triton is not installed. ValueError: an argument of the kernel has neither a
            type nor a value.
    """
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    missing = [name for name in kernel.arg_names if name not in types and name not in constants]
    if missing:
        raise ValueError(
            f"compile_report: types must name every argument, got none for {', '.join(missing)}."
        )
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton_compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    # Tensor memory exists on data-centre Blackwell only. A kernel that wants more than there is
    # compiles to an empty one.
    columns = getattr(compiled.metadata, "tmem_size", 0)
    return _read(compiled.asm["cubin"], compiled.metadata.shared, columns)


def _read(cubin: bytes, shared_bytes: int, tensor_memory_columns: int) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    # A cubin may hold helper functions beside the kernel: the kernel is the one that takes the
    # most.
    found = [
        (int(registers), int(stack))
        for registers, stack in re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    ]
    if not found:
        raise RuntimeError(
            f"compile_report: cuobjdump must name registers and stack, got {usage[:200]!r}."
        )
    return Report(
        registers=max(registers for registers, _ in found),
        stack_bytes=max(stack for _, stack in found),
        spill_instructions=len(_LOCAL_MEMORY.findall(code)),
        shared_bytes=shared_bytes,
        tensor_memory_columns=tensor_memory_columns,
        tensor_core_instructions=len(_TENSOR_CORE.findall(code)),
        float_instructions=len(re.findall(r"\bFFMA2?\b", code)),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, flags=re.MULTILINE)),
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(path), *arguments], check=True, capture_output=True, text=True
    ).stdout
