"""Does the newest release of a peer still match? Not part of `make test`: for a weekly job, because
it asks the package index.

    python -m tests.integrations.check_newest                          the newest transformers,
    cc-vjepa2, vjepa and lightly python -m tests.integrations.check_newest transformers==4.57.6
    a certain release

Each release goes into a folder of its own ahead of the environment's packages; then its classes
must be recognised and an accelerated model must equal the untouched one. Exits 1 when one does not,
and names it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The package's tests that build models and compare them: recognition and equality, not what only
# concerns this repository.
CHECKS = {
    "transformers": (
        "transformers",
        ("test_transformers_vjepa2.py", "test_transformers_ijepa.py"),
        "float32 or masks or patch",
    ),
    "cc-vjepa2": ("vjepa2", ("test_vjepa2.py",), "float32 or patch"),
    "vjepa": ("vjepa", ("test_vjepa1.py",), "float32 or patch"),
    "lightly": ("lightly", ("test_lightly_ijepa.py",), "float32 or patch"),
}
# What a package needs next to it; the others would bring another torch.
NEEDS = {"transformers": None, "lightly": ("torchvision", "timm")}


def install(requirement: str, folder: Path) -> None:
    name = re.split(r"[=<>!~]", requirement)[0]
    more = NEEDS.get(name, ())
    deps = [] if more is None else ["--no-deps"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        *deps,
        "--target",
        str(folder),
        requirement,
        *(more or ()),
    ]
    subprocess.run(command, check=True)


def matches(requirement: str) -> bool:
    """Installs the release and runs its checks; prints what was found."""
    name = re.split(r"[=<>!~]", requirement)[0]
    module, files, chosen = CHECKS[name]
    with tempfile.TemporaryDirectory() as scratch:
        install(requirement, Path(scratch))
        environment = os.environ | {"PYTHONPATH": scratch, "CI": "true"}
        where = (
            "import importlib.util as u; assert "
            f"u.find_spec({module!r}).origin.startswith({scratch!r})"
        )
        subprocess.run([sys.executable, "-c", where], check=True, env=environment, cwd=ROOT)
        version = (
            next(Path(scratch).glob(f"{name.replace('-', '_')}-*.dist-info"))
            .name.removesuffix(".dist-info")
            .split("-")[1]
        )
        tests = [f"tests/integrations/{file}" for file in files]
        child = subprocess.run(
            [sys.executable, "-m", "pytest", *tests, "-k", chosen], env=environment, cwd=ROOT
        )
    print(
        f"{name} {version}: {'matches' if child.returncode == 0 else 'DOES NOT MATCH'}", flush=True
    )
    return child.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "requirement",
        nargs="*",
        default=list(CHECKS),
        help="NAME or NAME==VERSION (default: the newest of each)",
    )
    asked = parser.parse_args(argv).requirement
    for requirement in asked:
        if re.split(r"[=<>!~]", requirement)[0] not in CHECKS:
            parser.error(f"requirement must name one of {', '.join(CHECKS)}, got {requirement!r}")
    return 0 if all([matches(requirement) for requirement in asked]) else 1


if __name__ == "__main__":
    sys.exit(main())
