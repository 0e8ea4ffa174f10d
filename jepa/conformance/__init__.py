"""Conformance with golden numbers of the published code: objectives, modules, and real training
steps.

Layout: ``objectives/``, ``modules/`` and ``steps/`` with one .npz file per case. Every array of
every file is either compared or used as an input; one that is neither is a miss. Published
behaviour is switched on.

Tolerances are fixed: 1e-5 of an array's norm; 1e-4 for gradients through the model, and for the
norms and sums of weights after a step. An array that misses its tolerance may still pass by its own
measured noise: see `jepa.conformance.sensitivity`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import jepa_kernels
from jepa.conformance import modules, objectives, sensitivity, steps
from jepa.conformance.golden import Golden, Run
from jepa.conformance.report import Report, Row, worst
from jepa.conformance.sensitivity import check_measured

__all__ = ["Golden", "Report", "check_file", "check_folder", "print_report"]

CHECKS: dict[str, Callable[[Golden, Report], None]] = {
    "objectives": objectives.check,
    "modules": modules.check,
    "steps": steps.check,
}
IGNORED = ("README.md",)
MISSES_SHOWN = 40
# What arrays that are missing, damaged or of another shape raise on the way through the code under
# test.
UNREADABLE = (KeyError, IndexError, ValueError, TypeError, RuntimeError, OSError, BadZipFile)


def check_folder(folder: Path, backend: str = "auto") -> Report:
    """Checks every file below a golden folder, or below one of its three parts.

    Args:
        folder: holds objectives/, modules/ and steps/, or is one of them.
        backend: attention backend.

    Returns:
        The report; `failures` is empty when all agrees.

    Raises:
        FileNotFoundError: there is nothing to check.
    """
    parts = [folder] if folder.name in CHECKS else [folder / name for name in CHECKS]
    present = [part for part in parts if part.is_dir()]
    report = Report()
    for part in present:
        for path in sorted(part.iterdir()):
            if path.name not in IGNORED:
                check_file(path, report, backend)
    if folder.name not in CHECKS and present:
        known = {*CHECKS, *IGNORED}
        for path in sorted(folder.iterdir()):
            if path.name not in known:
                report.open(path.name)
                report.miss("(file)", "not read: no check for files of this name")
    if not report.rows:
        raise FileNotFoundError(
            f"conformance: {folder} must hold {', '.join(CHECKS)} with .npz files, got none."
        )
    return report


def check_file(path: Path, report: Report, backend: str = "auto") -> None:
    """Checks one file; its folder's name says what it is."""
    report.open(f"{path.parent.name}/{path.stem}")
    if path.suffix != ".npz":
        report.miss("(file)", "not read: not an .npz file")
        return

    def check(run: Run, report: Report) -> Golden:
        golden = Golden(path, run)
        # float64 is the oracle's.
        with jepa_kernels.use_backend("reference" if run.dtype == torch.float64 else backend):
            CHECKS[path.parent.name](golden, report)
        return golden

    # One thread: the arrays are small, and sums then have one order.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report.finish(check_measured(check, report))
    except UNREADABLE as failure:
        report.miss("(file)", f"{type(failure).__name__}: {failure}")
    finally:
        torch.set_num_threads(threads)


def print_report(report: Report, console: Console, verbose: bool = False) -> None:
    """A table with the worst array of every file (or every array), what was settled by measured
    noise, the misses, and the counts."""
    table = Table("file", "arrays", "worst array", "error", "allowed", "", "note")
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for file, rows in report.by_file().items():
        shown = rows if verbose else [worst(rows)]
        for row in shown:
            table.add_row(file, str(len(rows)), *_cells(row))
    console.print(table)
    if report.measured:
        console.print(_measured_table(report))
    for row in report.failures[:MISSES_SHOWN]:
        console.print(
            f"MISS {row.file}: {row.array}: error {row.error:.2e} > {row.tolerance:.1e} {row.note}",
            style="red",
            markup=False,
        )
    if len(report.failures) > MISSES_SHOWN:
        console.print(f"... and {len(report.failures) - MISSES_SHOWN} more", style="red")
    measured = report.measured
    console.print(
        f"{len(report.by_file())} files, {len(report.rows)} arrays compared, "
        f"{len(report.failures)} misses; "
        f"{len(measured)} arrays of {len({row.file for row in measured})} files passed by their "
        f"measured noise, at most {sensitivity.CEILING:.1%} of their norm, undecided elements "
        "apart."
    )


def _measured_table(report: Report) -> Table:
    """The arrays of every file that needed their measured noise, and the elements that fall to
    either side of a kink."""
    table = Table(
        "file", "by noise", "largest noise", "largest error", "undecided elements of", "count"
    )
    table.columns[0].no_wrap = True
    for file, compared in report.by_file().items():
        rows = [row for row in compared if row.passed and row.noise is not None]
        if not rows:
            continue
        kinked = [row for row in rows if row.undecided]
        most = max(kinked, key=lambda row: row.undecided, default=None)
        others = f" and {len(kinked) - 1} more" if len(kinked) > 1 else ""
        table.add_row(
            file,
            f"{len(rows)} of {len(compared)}",
            f"{max(row.noise or 0.0 for row in rows):.1e}",
            f"{max(row.error for row in rows):.1e}",
            "" if most is None else escape(most.array) + others,
            "" if most is None else str(most.undecided),
        )
    return table


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    return (
        escape(row.array),
        f"{row.error:.2e}",
        f"{row.tolerance:.1e}",
        "ok" if row.passed else "MISS",
        escape(row.note),
    )
