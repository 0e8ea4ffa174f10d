"""The support table of the README, generated from what each backend says about itself."""

from __future__ import annotations

import torch

from .backend import ROOMS, Room

# Reasons that are about this machine, not about the backend: they do not make a gap in the table.
_LOCAL = (
    "is not built",
    "is not installed",
    "must be on",
    "does not load",
    "TRITON_INTERPRET",
    "another version",
    "ROCm",
    "compute capability",
)
_DEVICE = {"reference": "cpu", "torch": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gap(room: Room, backend: str, dtype: torch.dtype) -> str | None:
    """Why `backend` does not take `dtype` on any machine, or None."""
    reasons = room.reasons(backend, room.example(_DEVICE[backend], dtype))
    lasting = [r for r in reasons if not any(mark in r for mark in _LOCAL)]
    return "; ".join(lasting) or None


def table() -> str:
    """Markdown: one row per op and backend, one column per dtype."""
    names = [str(d).removeprefix("torch.") for d in _DTYPES]
    lines = [f"| op | backend | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for room in ROOMS.values():
        for backend in room.priority:
            cells = ["yes" if gap(room, backend, dtype) is None else "no" for dtype in _DTYPES]
            lines.append(f"| {room.name} | {backend} | {' | '.join(cells)} |")
    return "\n".join(lines)
