"""``python -m jepa_kernels doctor``: what this installation can run, what it cannot, why, and what
fixes it."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata

import torch

from . import __version__, backend, native


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> list[tuple[str, str]]:
    rows = [
        ("jepa_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _installed("triton")),
        ("platform", f"{platform.system()} {platform.machine()}"),
        ("threads", str(torch.get_num_threads())),
        ("CPU kernels", native.isa_name() if native.available() else f"missing: {native.reason()}"),
        ("CUDA library", native.cuda_reason() or "built"),
        ("host module", native.host_reason() or "built"),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            rows.append(
                (f"GPU {i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
            )
    elif torch.version.cuda is None:
        rows.append(
            (
                "GPU",
                "none usable: this build of torch has no CUDA (install a CUDA build of torch for "
                "one)",
            )
        )
    else:
        rows.append(
            (
                "GPU",
                f"none found by torch (built for CUDA {torch.version.cuda}; check the driver with "
                "nvidia-smi)",
            )
        )
    return rows


def _example_calls(room: backend.Room) -> list[tuple[str, object]]:
    """One small call per kind of device and dtype, as the room itself describes them."""
    calls = []
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            calls.append(
                (f"{device} {str(dtype).removeprefix('torch.')}", room.example(device, dtype))
            )
    return calls


def report() -> str:
    """The whole report as text."""
    lines = [f"{name:14s} {value}" for name, value in _machine()]
    for room in backend.ROOMS.values():
        lines += ["", room.name]
        for title, call in _example_calls(room):
            marks, notes = [], []
            for name in room.priority:
                reasons = room.reasons(name, call)
                marks.append(f"{name} {'yes' if not reasons else 'no'}")
                if reasons and not _wrong_place(call, name):
                    notes += [f"      {name}: {reason}" for reason in reasons]
            lines.append(f"  {title:14s} {'  '.join(marks)}")
            lines += [n for n in notes if n not in lines]
    return "\n".join(lines)


def _wrong_place(call: object, name: str) -> bool:
    """A CPU kernel for CUDA tensors, or the other way round, needs no fix."""
    device = call.device_type  # type: ignore[attr-defined]
    return (device == "cpu" and name in ("cuda", "triton")) or (device == "cuda" and name == "cpu")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jepa_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="versions, instruction set, GPU, and which backend can run which op, with reasons "
        "and fixes",
    )
    commands.add_parser("support", help="the support table of the README, in Markdown")
    chosen = parser.parse_args(arguments)
    if chosen.command == "doctor":
        print(report())
    else:
        from .support import table

        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
