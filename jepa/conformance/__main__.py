"""`python -m jepa.conformance DIR`: checks every file of a golden folder and exits non-zero on any
miss."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jepa.conformance import check_folder, print_report
from jepa.published_behaviour import PublishedBehaviour


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jepa.conformance", description=__doc__)
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="a folder with objectives/, modules/ and steps/, or one of these",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        help="attention backend: auto (default), reference, torch, cpu, ...",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="list every array, not only the worst of each file"
    )
    options = parser.parse_args(arguments)
    console = Console()
    switches = ", ".join(PublishedBehaviour.names())
    console.print(f"published behaviour switched on: {switches}")
    try:
        report = check_folder(options.folder, options.backend)
    except FileNotFoundError as failure:
        console.print(str(failure), style="red")
        return 2
    print_report(report, console, options.verbose)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
