"""Builds latent_rollout's CPU kernels with g++ alone and puts them, between fences, in the place of
the native torch ops."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from tests.native.build import CSRC, Unit, library, units
from tests.native.rollout_library import CpuLibrary
from tests.simt.rollout_abi import SimtOps, Table

HERE = Path(__file__).parent
_SANITIZERS = {
    None: [],
    "asan": ["-g1", "-fsanitize=address", "-fno-omit-frame-pointer"],
    "asan_ubsan": [
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ],
    "tsan": ["-g1", "-fsanitize=thread"],
}


def build(
    folder: Path, sanitizer: str | None = None, patched: Mapping[str, Path] | None = None
) -> Path:
    """A shared library of the kernels of every instruction set.

    Args:
        folder: where objects and libraries are kept, by the hash of what they are made of.
        sanitizer: None, "asan_ubsan", or "tsan" for all but AVX-512. A sanitized library loads only
            in a child of `run_sanitized`, and has the functions of list_parallel.cpp.
        patched: copies of csrc from which kernels are taken, by instruction set.
    """
    patched = patched or {}
    copies = {csrc: units("latent_rollout", csrc) for csrc in (CSRC, *patched.values())}
    # AVX-512 is always emulated: on a machine that has it, the tests of the op run the real
    # instructions.
    parts = [
        next(u for u in copies[patched.get(unit.isa, CSRC)] if u.name == unit.name).emulated()
        for unit in copies[CSRC]
    ]
    if sanitizer is not None:
        parts.append(Unit(HERE / "list_parallel.cpp", "", []))

    def flags(unit: Unit) -> list[str]:
        # The emulation takes long to compile: UBSan would judge it as well, and threads do nothing
        # else in it than elsewhere.
        emulation = "avx512" in unit.isa
        chosen = {"asan_ubsan": "asan", "tsan": None}.get(sanitizer) if emulation else sanitizer
        # What runs briefly need not run fast.
        quick = chosen is not None or unit.source.stem == "launch" or unit.isa in patched
        return ["-O0" if quick else "-O1", *_SANITIZERS[chosen]]

    return library("rollout", folder, parts, flags, _SANITIZERS[sanitizer])


def patch(folder: Path, file: str, sound: str, broken: str) -> Path:
    """A copy of csrc in `folder` with a fault in one file of latent_rollout/cpu."""
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)
    path = folder / "latent_rollout" / "cpu" / file
    text = path.read_text()
    assert sound in text
    path.write_text(text.replace(sound, broken))
    return folder


# What each function may write.
WRITTEN = {
    "mlp_fwd": ("sums", "inputs"),
    "mlp_bwd": ("grad_inputs", "activations"),
    "hamiltonian_fwd": ("sums", "inputs"),
    "hamiltonian_bwd": (
        "carried",
        "force",
        "activation",
        "grad_returned",
        "pulled",
        "grad_middle",
        "grad_energy",
    ),
    "readout": ("out", "errors", "signs"),
    "readout_gradient": ("grad", "grad_base"),
    "gru_fwd": ("states", "gates"),
    "gru_bwd": ("grad_gates", "grad_actions", "grad_small", "grad_start", "grad_norm"),
}
# elements: more than a row of most cases, and odd, so that no tensor is aligned to more than
# an element
_FENCE = 205


class _Fenced:
    """A copy of a tensor, whatever its strides, between bytes that are NaN as floats and -1 as
    indices."""

    def __init__(self, tensor: torch.Tensor) -> None:
        length = (
            1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            if tensor.numel()
            else 0
        )
        memory = torch.full(
            (tensor.element_size() * (length + 2 * _FENCE),), 0xFF, dtype=torch.uint8
        ).view(tensor.dtype)
        memory[_FENCE : _FENCE + length] = tensor.as_strided((length,), (1,))
        self.tensor, self.memory, self.before = tensor, memory, memory.clone()
        self.inside = memory.as_strided(tensor.shape, tensor.stride(), _FENCE)

    def close(self, name: str, written: bool) -> None:
        """Takes results over; nothing else may have changed, neither beyond the ends nor in the
        gaps between rows."""
        if written:
            self.tensor.copy_(self.inside)
            self.before.as_strided(self.tensor.shape, self.tensor.stride(), _FENCE).copy_(
                self.inside
            )
        assert torch.equal(self.memory.view(torch.uint8), self.before.view(torch.uint8)), (
            f"{name} was written where it must not be"
        )


class Fences:
    """A library every tensor of whose calls lies between fences."""

    def __init__(self, library: CpuLibrary) -> None:
        self.library = library

    def tiles(self, rows: int) -> int:
        return self.library.tiles(rows)

    def call(self, name: str, **values) -> None:
        fenced: dict[str, _Fenced] = {}

        def fence(field: str, value):
            if isinstance(value, Table):
                return value._replace(
                    data=fence(f"{field}.data", value.data),
                    index=fence(f"{field}.index", value.index),
                )
            if not isinstance(value, torch.Tensor):
                return value
            fenced[field] = _Fenced(value.detach())
            return fenced[field].inside

        self.library.call(name, **{field: fence(field, value) for field, value in values.items()})
        for field, copy in fenced.items():
            copy.close(f"{name}: {field}", field in WRITTEN[name])


class CpuOps(SimtOps):
    """What `native_ops.OPS` offers, where the CPU kernels differ from those of a GPU: signs,
    products of a GRU in the kernel, and numbers for products in the dtype of these."""

    def _operands(self, dtype, *shape):
        return torch.full(shape, torch.nan, dtype=dtype)

    def latent_rollout_errors(
        self, sums, weight, bias, base, base_rows, targets, target_rows, exponent, save_signs, isa
    ):
        errors, signs = self._new(*sums.shape[:2]), None
        if save_signs:
            signs = torch.full(
                (*sums.shape[:2], 2 * (-(-weight.shape[1] // 8))), 0xAA, dtype=torch.uint8
            )
        self._readout(
            "readout",
            sums,
            weight,
            bias,
            base,
            base_rows,
            1,
            errors=errors,
            signs=signs,
            **self._targets(targets, target_rows, exponent),
        )
        return errors, signs

    def _gru_gradients(self, horizon, rows, width, actions):
        pieces = self.library.tiles(rows)
        return super()._gru_gradients(horizon, rows, width, actions) | {
            "grad_gates": (horizon, rows, 3 * width),
            "grad_actions": (horizon, rows, actions),
            "grad_small": (pieces, 1 + actions, 4 * width),
        }
