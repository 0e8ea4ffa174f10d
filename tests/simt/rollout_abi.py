"""The CUDA kernels of latent_rollout on the SIMT executor, under the names that the native torch
ops have: ctypes over CPU tensors.

Sanitized children need only `Library` and NumPy arrays: torch is imported by `SimtOps` alone.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

from tests.abi.header import read

ABI = read("latent_rollout")
FLOAT32, BFLOAT16, FLOAT16 = (ABI.constants[f"JK_{n}"] for n in ("FLOAT32", "BFLOAT16", "FLOAT16"))
Rows = ABI.structs["jk_rollout_rows"]


class Table(NamedTuple):
    """A jk_rollout_rows by its arrays: rows of `data`, all in turn or those of `index`."""

    data: Any
    index: Any
    stride: int
    dtype: int


class Library:
    """The C ABI of latent_rollout's kernels for one kind of device; a refusal becomes a
    RuntimeError. This one: launch.cu, built for the executor."""

    device = "cuda"

    def __init__(self, path: str | Path) -> None:
        self.library = ABI.open(path)

    def _function(self, name: str):
        return getattr(self.library, f"jk_latent_rollout_{self.device}_{name}")

    def more(self) -> tuple:
        """The arguments behind the parameters: a stream."""
        return (None,)

    def tiles(self, rows: int) -> int:
        return self._function("gru_tiles")(rows)

    def call(self, name: str, **values) -> None:
        """Runs one function; a value is a number, a Table, or something with an address (array or
        tensor)."""
        function = self._function(name)
        params = function.argtypes[0]._type_()
        for field, value in values.items():
            setattr(params, field, _field(value))
        error = function(ctypes.byref(params), *self.more())
        if error is not None:
            raise RuntimeError(error.decode())


def _field(value):
    if isinstance(value, (int, float)):
        return value
    return (
        Rows(_address(value.data), _address(value.index), value.stride, value.dtype)
        if isinstance(value, Table)
        else _address(value)
    )


def _address(value) -> int | None:
    if value is None:
        return None
    return value.data_ptr() if hasattr(value, "data_ptr") else value.ctypes.data


def run_on(monkeypatch, backend: str, ops) -> None:
    """A backend of C++ kernels runs on `ops` in the place of the native torch ops, and takes CPU
    tensors."""
    from dataclasses import replace

    from jepa_kernels.backend import OPS
    from jepa_kernels.ops.latent_rollout import native_ops
    from jepa_kernels.testing.rollout import OP_NAMES

    monkeypatch.setattr(native_ops, "OPS", ops)
    for name in OP_NAMES.values():
        backends = OPS[name].backends
        willing = replace(backends[backend], unsupported=lambda inputs: [])
        monkeypatch.setitem(backends, backend, willing)


def run_cuda_on(monkeypatch, library) -> None:
    """The CUDA backend runs on `library` (or a Recorder of it)."""
    run_on(monkeypatch, "cuda", SimtOps(library))


class SimtOps:
    """What `native_ops.OPS` offers, on the executor. New tensors hold NaN, so that an element
    nobody writes is seen."""

    def __init__(self, library: Library) -> None:
        import torch

        self.library, self.torch = library, torch
        self.codes = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

    def _new(self, *shape: int):
        return self.torch.full(shape, self.torch.nan)

    def _operands(self, dtype, *shape: int):
        """Numbers that only go into products of this dtype."""
        return self._new(*shape)

    def _rows(self, table, index) -> Table:
        return Table(table, index, table.stride(-2), self.codes[table.dtype])

    def latent_rollout_mlp_fwd(self, start, coupling, drift, horizon, keep_all, save, isa):
        rows, hidden = start.shape
        kept = horizon if keep_all else 1
        sums, inputs = (
            self._new(kept, rows, hidden),
            self._new(horizon, rows, hidden) if save else self._new(0),
        )
        self.library.call(
            "mlp_fwd",
            rows=rows,
            hidden=hidden,
            horizon=horizon,
            kept=kept,
            operand=self.codes[coupling.dtype],
            start=start,
            coupling=coupling,
            drift=drift,
            sums=sums,
            inputs=inputs if save else None,
        )
        return inputs, sums

    def latent_rollout_mlp_bwd(self, inputs, coupling, grad_sums, isa):
        horizon, rows, hidden = inputs.shape
        dtype = self.torch.float32 if coupling is None else coupling.dtype
        grad_inputs, activations = (
            self._operands(dtype, steps, rows, hidden) for steps in (horizon, horizon - 1)
        )
        self.library.call(
            "mlp_bwd",
            rows=rows,
            hidden=hidden,
            horizon=horizon,
            kept=grad_sums.shape[0],
            operand=self.codes[dtype],
            coupling=coupling,
            inputs=inputs,
            grad_sums=grad_sums,
            grad_inputs=grad_inputs,
            activations=activations,
        )
        return grad_inputs, activations

    def latent_rollout_hamiltonian_fwd(
        self, start, weight, bias, energy, coupling, time_step, horizon, keep_all, save, isa
    ):
        rows, hidden = start.shape
        kept = horizon if keep_all else 1
        sums, inputs = (
            self._new(2, kept, rows, hidden),
            self._new(2 * horizon, rows, hidden) if save else self._new(0),
        )
        self.library.call(
            "hamiltonian_fwd",
            rows=rows,
            hidden=hidden,
            middle=weight.shape[0],
            horizon=horizon,
            kept=kept,
            operand=self.codes[weight.dtype],
            time_step=time_step,
            start=start,
            weight=weight,
            bias=bias,
            energy=energy,
            coupling=coupling,
            sums=sums,
            inputs=inputs if save else None,
        )
        return inputs, sums

    def latent_rollout_hamiltonian_bwd(
        self, input, weight, bias, energy, coupling, time_step, transposed, following, carried, isa
    ):
        rows, hidden = input.shape
        middle = weight.shape[0]
        force, left, right, grad_energy = (
            self._new(*s)
            for s in ((rows, hidden), (2, rows, middle), (2, rows, hidden), (rows, middle))
        )
        self.library.call(
            "hamiltonian_bwd",
            rows=rows,
            hidden=hidden,
            middle=middle,
            operand=self.codes[weight.dtype],
            transposed=int(transposed),
            time_step=time_step,
            weight=weight,
            coupling=coupling,
            bias=bias,
            energy=energy,
            input=input,
            following=following,
            carried=carried,
            force=force,
            activation=right[1],
            grad_returned=right[0],
            pulled=left[0],
            grad_middle=left[1],
            grad_energy=grad_energy,
        )
        return force, left, right, grad_energy

    def _readout(self, name, sums, weight, bias, base, base_rows, first_step, **values) -> None:
        steps, rows, hidden = sums.shape
        self.library.call(
            name,
            rows=rows,
            hidden=hidden,
            channels=weight.shape[1],
            steps=steps,
            first_step=first_step,
            operand=self.codes[weight.dtype],
            sums=sums,
            weight=weight,
            weight_row_stride=weight.stride(0),
            weight_column_stride=weight.stride(1),
            bias=bias,
            base=self._rows(base, base_rows),
            **values,
        )

    def latent_rollout_readout(self, sums, weight, bias, base, base_rows, first_step, out, isa):
        self._readout(
            "readout",
            sums,
            weight,
            bias,
            base,
            base_rows,
            first_step,
            out=out,
            out_step_stride=out.stride(0),
            out_row_stride=out.stride(1),
            out_dtype=self.codes[out.dtype],
        )

    def _targets(self, targets, target_rows, exponent) -> dict:
        step = targets.stride(0) if target_rows is None else 0
        return {
            "targets": self._rows(targets, target_rows),
            "target_step_stride": step,
            "exponent": exponent,
        }

    def latent_rollout_errors(
        self, sums, weight, bias, base, base_rows, targets, target_rows, exponent, save_signs, isa
    ):
        errors = self._new(*sums.shape[:2])
        self._readout(
            "readout",
            sums,
            weight,
            bias,
            base,
            base_rows,
            1,
            errors=errors,
            **self._targets(targets, target_rows, exponent),
        )
        return errors, None

    def latent_rollout_errors_gradient(
        self,
        sums,
        weight,
        bias,
        base,
        base_rows,
        targets,
        target_rows,
        exponent,
        signs,
        first_step,
        grad_errors,
        grad_base,
        isa,
    ):
        grad = self._operands(weight.dtype, *sums.shape[:2], weight.shape[1])
        self._readout(
            "readout_gradient",
            sums,
            weight,
            bias,
            base,
            base_rows,
            first_step,
            grad_errors=grad_errors,
            grad=grad,
            grad_base=grad_base,
            grad_base_stride=grad_base.stride(0),
            signs=signs,
            **self._targets(targets, target_rows, exponent),
        )
        return grad

    def _gru(self, name, start, actions, weights, epsilon, **values) -> None:
        horizon, rows, width = actions.shape
        names = (
            "weight_input",
            "weight_state",
            "bias_input",
            "bias_state",
            "norm_weight",
            "norm_bias",
        )
        self.library.call(
            name,
            rows=rows,
            channels=start.shape[1],
            actions=width,
            horizon=horizon,
            operand=self.codes[weights[0].dtype],
            epsilon=epsilon,
            start=start,
            start_stride=start.stride(0),
            action=actions,
            **dict(zip(names, weights, strict=True)),
            **values,
        )

    def latent_rollout_gru_fwd(self, start, actions, weights, epsilon, keep_all, save, isa):
        horizon, rows, _ = actions.shape
        kept = horizon if keep_all else 1
        states = self._new(kept, rows, start.shape[1])
        gates = self._new(horizon, rows, 4 * start.shape[1]) if save else self._new(0)
        self._gru(
            "gru_fwd",
            start,
            actions,
            weights,
            epsilon,
            kept=kept,
            states=states,
            gates=gates if save else None,
        )
        return states, gates

    def _gru_gradients(
        self, horizon: int, rows: int, width: int, actions: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what the backward pass returns, in its order; products with actions are left to
        torch."""
        pieces = self.library.tiles(rows)
        return {
            "grad_gates": (horizon, rows, 4 * width),
            "grad_start": (rows, width),
            "grad_norm": (pieces, 2, width),
            "grad_actions": (0, rows, actions),
            "grad_small": (0, 1 + actions, 4 * width),
        }

    def latent_rollout_gru_bwd(
        self, start, actions, states, gates, weights, epsilon, grad_states, every_step, isa
    ):
        horizon, rows, given = actions.shape
        results = {
            name: self._new(*shape)
            for name, shape in self._gru_gradients(horizon, rows, start.shape[1], given).items()
        }
        results["grad_gates"] = self._operands(weights[0].dtype, *results["grad_gates"].shape)
        self._gru(
            "gru_bwd",
            start,
            actions,
            weights,
            epsilon,
            kept=horizon,
            states=states,
            gates=gates,
            grad_states=grad_states,
            every_step=int(every_step),
            **results,
        )
        return list(results.values())
