"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all. Loading never
executes pickled code.

    <run>/checkpoints/step_00000500/{model.safetensors, optimizer.safetensors, state.json}

A folder is written under a temporary name, flushed to disk and renamed: whoever kills the process
finds either the old set of checkpoints or the new one. The best checkpoint is the kept one with the
lowest score in its `state.json`; nothing else has to be written for it. `state.json` also holds a
digest of the tensor files, so that a damaged one is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from jepa.atomic import UNFINISHED, flush, named_failure, save_tensors, sweep, write_json

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8,})")
_TENSOR_FILES = ("model", "optimizer")
_RANDOM = "rng/cpu"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says which file and why."""


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by parameter name, as `exp_avg/<name>`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": value.detach()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`, for whole or sharded parameters. A name that the model
    lacks is an error."""
    parameters = dict(model.named_parameters())
    fused = bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
    state: dict[Tensor, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        key, _, name = full.partition("/")
        if name not in parameters:
            raise CheckpointError(
                "checkpoint: optimizer.safetensors must hold parameters of the model, got "
                f"{name!r}."
            )
        parameter = parameters[name]
        if value.dim() and value.shape != parameter.shape:
            raise CheckpointError(
                f"checkpoint: optimizer.safetensors must hold {full} of shape "
                f"{tuple(parameter.shape)}, got {tuple(value.shape)}."
            )
        # A step count is one number and stays as it is; moments go where their parameter is.
        placed = value.to(parameter.device if value.dim() or fused else "cpu")
        state.setdefault(parameter, {})[key] = (
            sharded_like(placed, parameter) if value.dim() else placed
        )
    optimizer.state.clear()
    optimizer.state.update(state)


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What training goes on from: (weights, moments and the random state of the CPU), gathered
    where sharded (then every process must call)."""
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    moments = {name: whole(value) for name, value in optimizer_tensors(model, optimizer).items()}
    return weights, {**moments, _RANDOM: torch.get_rng_state()}


def load_training_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> None:
    """The inverse of `training_tensors`.

    Raises:
        CheckpointError: what is there is not of this model, or the random state is missing.
    """
    load_model_tensors(model, weights)
    if _RANDOM not in moments:
        raise CheckpointError(f"checkpoint: optimizer.safetensors must hold {_RANDOM}, got none.")
    load_optimizer_tensors(
        model, optimizer, {name: value for name, value in moments.items() if name != _RANDOM}
    )
    torch.set_rng_state(moments[_RANDOM])


def whole(value: Tensor) -> Tensor:
    """A tensor, gathered from all processes where it is sharded (then every process must call)."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def sharded_like(value: Tensor, other: Tensor) -> Tensor:
    """`value`, which every process holds whole, sharded as `other` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value, other.device_mesh, other.placements)


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Every parameter and buffer of the model from whole tensors.

    Raises:
        CheckpointError: names or shapes are not those of the model.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    other = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    for problem, names in (
        ("have", missing),
        ("not have", extra),
        ("have other shapes for", sorted(other)),
    ):
        if names:
            listed = ", ".join(names[:3]) + (
                f" and {len(names) - 3} more" if len(names) > 3 else ""
            )
            raise CheckpointError(
                "checkpoint: model.safetensors must fit the configured model, got a file that "
                f"should {problem} {listed}."
            )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(sharded_like(tensors[name].to(value.device), value))


def environment() -> dict[str, Any]:
    """What a bitwise equal resume depends on besides the checkpoint."""
    import jepa_kernels
    from jepa_kernels import native

    return {
        "torch": torch.__version__,
        "jepa_kernels": jepa_kernels.__version__,
        "isa": native.isa_name() if native.available() else "none",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: made by the first save.
        keep_last: newest checkpoints that stay besides the best one.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"Checkpoints: keep_last must be at least 1, got {keep_last}.")
        self.folder, self.keep_last = Path(folder), keep_last

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, rising."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def best(self) -> tuple[int, float] | None:
        """(step, score) of the best checkpoint that is there, lower being better and the earliest
        winning a tie."""
        scores = [(read_state(self.path(step))["score"], step) for step in self.steps()]
        known = [(score, step) for score, step in scores if score is not None]
        return None if not known else (min(known)[1], min(known)[0])

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        score: float | None = None,
    ) -> Path:
        """Writes the checkpoint of `step` atomically, and removes those that need not be kept.

        Args:
            step: optimiser steps done.
            model, optimizer: tensors by name; ones that share storage are written out each.
            state: anything JSON can hold.
            score: lower is better; one that is None or not finite is never the best.

        Raises:
            OSError: it could not be written; the checkpoints are then those of before.
        """
        final = self.path(step)
        temporary = self.folder / f"{UNFINISHED}{os.getpid()}-{step:08d}"
        try:
            with named_failure(final):
                self._write(temporary, final, step, model, optimizer, state, score)
                self._prune()
        finally:
            sweep(self.folder)
        return final

    def _write(
        self,
        temporary: Path,
        final: Path,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        score: float | None,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        temporary.mkdir()
        for name, tensors in zip(_TENSOR_FILES, (model, optimizer)):
            # Cloned on the way: safetensors refuses tensors that share memory.
            save_tensors(
                temporary / f"{name}.safetensors",
                {
                    key: value.detach().to("cpu").contiguous().clone()
                    for key, value in tensors.items()
                },
            )
        digests = {name: _digest(temporary / f"{name}.safetensors") for name in _TENSOR_FILES}
        known = None if score is None or not math.isfinite(score) else score
        head = {
            "format": FORMAT,
            "step": step,
            "score": known,
            "sha256": digests,
            "environment": environment(),
        }
        write_json(temporary / "state.json", {**head, **state})
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        # A run that was resumed from an earlier step comes by again: the same step means the same
        # bits.
        if not final.exists():
            os.rename(temporary, final)
            flush(self.folder)

    def load(
        self, step: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """(model, optimizer, state) of a step, or of the newest one.

        Raises:
            CheckpointError: there is none, or a file of it cannot be read.
        """
        if step is None:
            steps = self.steps()
            if not steps:
                raise CheckpointError(
                    f"checkpoint: {self.folder} must hold a checkpoint, got none."
                )
            step = steps[-1]
        return load(self.path(step))

    def tidy(self) -> None:
        """Ends what a kill has cut off within a save: for the run whose folder it is, before it
        goes on. One that was killed after its last step saves nothing more."""
        if self.folder.is_dir():
            sweep(self.folder)
            self._prune()

    def _prune(self) -> None:
        best = self.best()
        keep = {*self.steps()[-self.keep_last :], *([best[0]] if best else [])}
        for step in self.steps():
            if step not in keep:
                # Renamed first: a kill in the middle of the removal must not leave half a
                # checkpoint under a valid name.
                doomed = self.folder / f"{UNFINISHED}{os.getpid()}-old-{step:08d}"
                os.rename(self.path(step), doomed)
                shutil.rmtree(doomed)


def read_state(folder: str | Path) -> dict[str, Any]:
    """What `state.json` of one checkpoint folder says.

    Raises:
        CheckpointError: it cannot be read, or is of another format.
    """
    path = Path(folder) / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: {path} must be the JSON of a checkpoint, got {type(error).__name__}: "
            f"{error}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"checkpoint: {path} must be of format {FORMAT}, got {found!r}.")
    lacking = [key for key in ("step", "score", "sha256", "environment") if key not in state]
    if lacking:
        raise CheckpointError(
            f"checkpoint: {path} must have the keys {', '.join(lacking)}, got none of that name."
        )
    return state


def load(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(model, optimizer, state) of one checkpoint folder.

    Raises:
        CheckpointError: a file is missing, damaged or of another format.
    """
    state = read_state(folder)
    model, optimizer = (
        _read_tensors(Path(folder) / f"{name}.safetensors", state["sha256"].get(name))
        for name in _TENSOR_FILES
    )
    return model, optimizer, state


def load_model(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(model, state) of one checkpoint folder, for those who do not go on training."""
    state = read_state(folder)
    return _read_tensors(Path(folder) / "model.safetensors", state["sha256"].get("model")), state


def _read_tensors(path: Path, digest: str | None) -> dict[str, Tensor]:
    try:
        found = _digest(path)
        if found != digest:
            raise CheckpointError(
                f"checkpoint: {path} must have the digest that state.json gives ({digest}), got "
                f"{found}."
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint: {path} must be a whole file, got {type(error).__name__}: {error}"
        ) from error


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def warn_of_differences(saved: Mapping[str, Any]) -> list[str]:
    """Logs what differs from the environment a checkpoint was written in; the resumed run is then
    not bitwise equal."""
    differences = [
        f"{key} {saved.get(key)!r} then, {value!r} now"
        for key, value in environment().items()
        if saved.get(key) != value
    ]
    for difference in differences:
        _log.warning(
            "resuming in another environment, so results will not be bitwise equal: %s", difference
        )
    return differences
