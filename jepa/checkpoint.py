"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all. Loading never executes pickled code.

    <run>/checkpoints/step_00000500/{model.safetensors, optimizer.safetensors, state.json}

A folder is written under a temporary name, flushed to disk and renamed: whoever kills the process finds either the old set of checkpoints or
the new one. `best.json` names the checkpoint with the best score and is replaced atomically.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".writing-"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says which file and why."""


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` atomically."""
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by parameter name, as `exp_avg/<name>`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": value.detach()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Moments keep their values; a name that the model lacks is an error."""
    parameters = dict(model.named_parameters())
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        key, _, name = full.partition("/")
        if name not in parameters:
            raise CheckpointError(f"checkpoint: optimizer.safetensors must hold parameters of the model, got {name!r}.")
        # A step count is one number and stays as it is; moments go where their parameter is.
        where = parameters[name].device if value.dim() or optimizer.defaults.get("fused") or optimizer.defaults.get("capturable") else "cpu"
        state.setdefault(parameters[name], {})[key] = value.to(where)
    optimizer.state.clear()
    optimizer.state.update(state)


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
        folder: made if absent; left-overs of a killed save are removed.
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
        """(step, score) of the best checkpoint, lower being better."""
        try:
            value = json.loads((self.folder / "best.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return int(value["step"]), float(value["score"])

    def save(
        self, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any], score: float | None = None
    ) -> Path:
        """Writes the checkpoint of `step` atomically, notes whether it is the best, and removes what need not be kept.

        Args:
            step: optimiser steps done.
            model, optimizer: tensors by name; ones that share storage are written out each.
            state: anything JSON can hold.
            score: lower is better; None leaves the best one alone.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        temporary = self.folder / f"{_TEMPORARY}{os.getpid()}-{step:08d}"
        temporary.mkdir()
        for name, tensors in (("model", model), ("optimizer", optimizer)):
            # Cloned on the way: safetensors refuses tensors that share memory.
            save_file(
                {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}, temporary / f"{name}.safetensors"
            )
        write_json(temporary / "state.json", {"format": FORMAT, "step": step, "environment": environment(), **state})
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        final = self.path(step)
        if final.exists():
            # A run that was resumed from an earlier step comes by again: the same step means the same bits.
            shutil.rmtree(temporary)
        else:
            os.rename(temporary, final)
            _flush(self.folder)
        best = self.best()
        if score is not None and score == score and (best is None or score < best[1] or not self.path(best[0]).exists()):
            write_json(self.folder / "best.json", {"step": step, "score": score})
        self._prune()
        return final

    def load(self, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """(model, optimizer, state) of a step, or of the newest one.

        Raises:
            CheckpointError: there is none, or a file of it cannot be read.
        """
        if step is None:
            steps = self.steps()
            if not steps:
                raise CheckpointError(f"checkpoint: {self.folder} must hold a checkpoint, got none.")
            step = steps[-1]
        return load(self.path(step))

    def _sweep(self) -> None:
        for entry in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _prune(self) -> None:
        best = self.best()
        keep = {*self.steps()[-self.keep_last :], *([best[0]] if best else [])}
        for step in self.steps():
            if step not in keep:
                # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a valid name.
                doomed = self.folder / f"{_TEMPORARY}{os.getpid()}-old-{step:08d}"
                os.rename(self.path(step), doomed)
                shutil.rmtree(doomed)


def load(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(model, optimizer, state) of one checkpoint folder."""
    folder = Path(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        model, optimizer = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint: {folder} must be a whole checkpoint, got {type(error).__name__}: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint: {folder} must be of format {FORMAT}, got {state.get('format')!r}.")
    return model, optimizer, state


def warn_of_differences(saved: Mapping[str, Any]) -> list[str]:
    """Logs what differs from the environment a checkpoint was written in; the resumed run is then not bitwise equal."""
    differences = [f"{key} {saved.get(key)!r} then, {value!r} now" for key, value in environment().items() if saved.get(key) != value]
    for difference in differences:
        _log.warning("resuming in another environment, so results will not be bitwise equal: %s", difference)
    return differences


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
