"""Calls of latent_rollout's C ABI in a file, and their replay in a child without torch: ``python
rollout_saved.py LIBRARY CALLS.npz SANITIZER``.

Every array is saved as the flat span of memory from its first to its last element, so that in the
child it lies between the guard bytes of the address sanitizer whatever its strides are.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from tests.simt.build import ORDERS, configure
from tests.simt.rollout_abi import Library, Table


def span(tensor) -> np.ndarray:
    """A copy of the memory of a tensor, 16-bit floats as their bits."""
    import torch

    length = (
        1
        + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if tensor.numel()
        else 0
    )
    flat = torch.as_strided(tensor.detach(), (length,), (1,)).clone()
    return (
        flat.view(torch.int16) if flat.dtype in (torch.bfloat16, torch.float16) else flat
    ).numpy()


def allowed(tensor) -> np.ndarray:
    """rtol and atol of a replay: another compiler or instruction set fuses other operations."""
    from jepa_kernels.testing import BFLOAT16, FLOAT32_CANCELLING

    tolerance = BFLOAT16 if tensor.element_size() == 2 else FLOAT32_CANCELLING
    return np.array([tolerance["rtol"], tolerance["atol"]])


class Recorder:
    """A Library that keeps what it was given and what came out."""

    def __init__(self, library: Library) -> None:
        self.library, self.arrays, self.count = library, {}, 0

    def tiles(self, rows: int) -> int:
        return self.library.tiles(rows)

    def call(self, name: str, **values) -> None:
        tensors = {}
        for field, value in values.items():
            where = f"{self.count:03d}/{name}/{field}"
            if isinstance(value, Table):
                self.arrays[f"{where}/table"] = np.array([value.stride, value.dtype])
                tensors |= {f"{where}/data": value.data} | (
                    {} if value.index is None else {f"{where}/index": value.index}
                )
            elif isinstance(value, (int, float)):
                self.arrays[f"{where}/number"] = np.array(value)
            elif value is not None:
                tensors[f"{where}/array"] = value
        self.arrays |= {f"{where}/before": span(tensor) for where, tensor in tensors.items()}
        self.arrays |= {f"{where}/tolerance": allowed(tensor) for where, tensor in tensors.items()}
        self.library.call(name, **values)
        self.arrays |= {f"{where}/after": span(tensor) for where, tensor in tensors.items()}
        self.count += 1


def _call(library: Library, name: str, values: dict) -> None:
    try:
        library.call(name, **values)
    except RuntimeError as error:
        print(error, file=sys.stderr)


class Saved(NamedTuple):
    """One call of a file."""

    label: str
    name: str
    values: dict[str, Any]
    arrays: dict[str, np.ndarray]  # what the call reads and writes
    wanted: dict[str, np.ndarray]  # what they should hold afterwards, by the same names
    tolerances: dict[str, np.ndarray]  # rtol and atol, by the same names

    def check(self, note: str = "") -> None:
        """Results must be the saved ones up to rounding."""
        for key, wanted in self.wanted.items():
            actual, tolerance = self.arrays[key], dict(zip(("rtol", "atol"), self.tolerances[key]))
            if wanted.dtype == np.int16:
                actual, wanted = (
                    (a.astype(np.uint32) << 16).view(np.float32) for a in (actual, wanted)
                )
            np.testing.assert_allclose(
                actual, wanted, **tolerance, err_msg=f"{self.label} {key} {note}"
            )


def saved_calls(path: str) -> Iterator[Saved]:
    """The calls of a file in their order, each with arrays of its own."""
    with np.load(path) as saved:
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key in saved.files:
            number, name, rest = key.split("/", 2)
            groups.setdefault(f"{number}/{name}", {})[rest] = saved[key]
    for label, entries in sorted(groups.items()):
        values: dict[str, Any] = {}
        arrays = {
            key.removesuffix("/before"): entry.copy()
            for key, entry in entries.items()
            if key.endswith("/before")
        }
        for key, entry in entries.items():
            field, kind = key.split("/")[:2]
            if kind == "number":
                values[field] = entry.item()
            elif kind == "array":
                values[field] = arrays[f"{field}/array"]
            elif kind == "table":
                values[field] = Table(
                    arrays[f"{field}/data"], arrays.get(f"{field}/index"), *(int(v) for v in entry)
                )
        wanted, tolerances = (
            {
                key.removesuffix(f"/{kind}"): entry
                for key, entry in entries.items()
                if key.endswith(f"/{kind}")
            }
            for kind in ("after", "tolerance")
        )
        yield Saved(label, label.split("/")[1], values, arrays, wanted, tolerances)


def replay(path: str, calls: str, sanitizer: str) -> None:
    """Each call in the next thread order."""
    library, count = Library(path), 0
    for saved, order in zip(saved_calls(calls), cycle(ORDERS)):
        configure(library.library, order, seed=5)
        if sanitizer == "tsan":
            # In a thread of its own: TSan takes NumPy's reuse of a stack that the executor's fibers
            # have read for a race.
            fresh = threading.Thread(target=_call, args=(library, saved.name, saved.values))
            fresh.start()
            fresh.join()
        else:
            _call(library, saved.name, saved.values)
        saved.check(order)
        count += 1
    print(f"{count} calls agree")


if __name__ == "__main__":
    replay(*sys.argv[1:])
