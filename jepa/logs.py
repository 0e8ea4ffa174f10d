"""What a run writes and shows: one JSON line per log interval, TensorBoard scalars, and a rich
progress bar or plain lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jepa.atomic import named_failure, write_text

_FLUSH_S = 2
_SHOWN = ("loss", "effective_rank", "clips_per_s", "data_wait_share")


class RunLog:
    """`log.jsonl` and TensorBoard files in a run's folder; lines past the step a run resumes from
    are dropped first.

    Args:
        folder: of the run. step: the optimiser step to go on from. active: False for all but one
            process.
    """

    def __init__(self, folder: Path, step: int, *, active: bool = True) -> None:
        self.folder, self.active = folder, active
        self.console = Console(quiet=not active, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None
        if not active:
            return
        self._path = folder / "log.jsonl"
        _keep_until(self._path, step)
        # Not buffered: what could not be written must not be tried again on closing.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed in __exit__)
        from torch.utils.tensorboard import SummaryWriter

        # After an interrupt between an entry of its queue and the call that wakes the reader,
        # closing waits for the next flush.
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1, flush_secs=_FLUSH_S
        )

    def headline(self, values: Mapping[str, Any]) -> None:
        """The resolved configuration in one small table."""
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in values.items():
            table.add_row(f"[bold]{name}[/bold]", str(value))
        self.console.print(table)

    def __enter__(self) -> Self:
        if self.active and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._progress = Progress(*columns, console=self.console)
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self.active:
            self._file.close()
            # A board that could not write what it had fails at closing again: the first failure is
            # the one to tell.
            failed = exception[:1] != (None,)
            with suppress(OSError) if failed else named_failure(self.folder / "tensorboard"):
                self._board.close()

    def write(self, line: Mapping[str, Any], total_steps: int) -> None:
        if not self.active:
            return
        # JSON has no NaN.
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
        }
        self._append(json.dumps(finite) + "\n")
        with named_failure(self.folder / "tensorboard"):
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name, value, line["step"])
        note = "  ".join(f"{name} {line[name]:.4g}" for name in _SHOWN if name in line)
        if self._progress is None:
            self.console.print(f"step {line['step']}/{total_steps}  {note}", highlight=False)
            return
        if self._task is None:
            self._task = self._progress.add_task("training", total=total_steps, note="")
        self._progress.update(self._task, completed=line["step"], note=note)

    def _append(self, text: str) -> None:
        """Writes a line whole, or OSError and nothing of it."""
        content, size = text.encode(), os.fstat(self._file.fileno()).st_size
        with named_failure(self._path):
            try:
                while content:
                    content = content[self._file.write(content) :]
            except OSError:
                self._file.truncate(size)
                raise


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of steps that a resumed run will do again, and a last line that a kill cut
    short."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        if line["step"] <= step:
            kept.append(text)
    write_text(path, "".join(text + "\n" for text in kept))
