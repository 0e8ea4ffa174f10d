"""The command `jepa`. Here is only what must work without the packages of the extra `train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Before torch loads OpenMP: threads that wait for one another spin by default, and beside another
# program a parallel region then takes twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What the extra `train` of this package brings, by the name that an import uses.
TRAIN_EXTRA = (
    "PIL",
    "av",
    "docstring_parser",
    "matplotlib",
    "rich",
    "safetensors",
    "tensorboard",
    "yaml",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from jepa import commands

        return commands.main(words)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in TRAIN_EXTRA:
            raise
        print(
            f"jepa: the package of the module {error.name!r} must be installed; the extra `train` "
            "brings it: pip install 'jepa-kernels[train]'.",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
