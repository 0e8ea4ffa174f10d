"""``python -m jepa_kernels doctor``: what this installation can run, what it cannot, why, and what
fixes it."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata

import torch

from . import __version__, backend, calibrate, native, preferences, support
from .checks import dtype_name

# Wheels of these were built and used; metadata allows one release more.
TRIED_PYTHONS = ("3.11", "3.12", "3.13")


def _python() -> str:
    version = platform.python_version()
    if version.rpartition(".")[0] in TRIED_PYTHONS:
        return version
    return f"{version} (allowed, but tried on {', '.join(TRIED_PYTHONS)} alone)"


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> list[tuple[str, str]]:
    rows = [
        ("jepa_kernels", __version__),
        ("python", _python()),
        ("torch", torch.__version__),
        ("triton", _installed("triton")),
        ("platform", f"{platform.system()} {platform.machine()}"),
        ("threads", str(torch.get_num_threads())),
        ("preferences", preferences.summary()),
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


def report() -> str:
    """The whole report as text."""
    lines = [f"{name:14s} {value}" for name, value in _machine()]
    for op in backend.OPS.values():
        lines += ["", op.name]
        for device in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                inputs = support.example(op, device, dtype)
                marks, notes = [], []
                for name, record in op.backends.items():
                    reasons = op.reasons(name, inputs)
                    marks.append(f"{name} {'yes' if not reasons else 'no'}")
                    if record.takes(device):  # a kernel of another device needs no fix
                        notes += [f"      {name}: {reason}" for reason in reasons]
                lines.append(f"  {device + ' ' + dtype_name(dtype):14s} {'  '.join(marks)}")
                lines += [n for n in notes if n not in lines]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jepa_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="versions, instruction set, GPU, and which backend can run which op, with reasons "
        "and fixes",
    )
    commands.add_parser("support", help="which backend takes which dtype, in Markdown")
    calibration = commands.add_parser(
        "calibrate",
        help="measure this machine for about a minute and let auto follow what was fastest",
    )
    calibration.add_argument(
        "--seconds", type=float, default=60.0, help="how long to measure (default 60)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.command == "calibrate":
        try:
            print(calibrate.run(chosen.seconds))
        except (OSError, ValueError) as error:
            print(f"calibrate: {error}", file=sys.stderr)
            return 1
    elif chosen.command == "doctor":
        print(report())
    else:
        print(support.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
