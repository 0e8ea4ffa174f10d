"""The GPU run on a CPU, killed at random moments and gone on with: what was done must be intact.

python -m benchmarks.gpu_dry            all three commands; about two minutes on two cores
python -m benchmarks.gpu_dry check --kills 1
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gpu_lines, gpu_records
from benchmarks.gpu_run import PARTS, ROOT

Kept = dict[str, object]


def kept(folder: Path) -> Kept:
    """What a later run must not lose: the records of every file, the status of every ended step."""
    found: Kept = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".jsonl":
            found[str(path)] = gpu_lines.read(path)
        elif path.name.endswith(".status.json"):
            found[str(path)] = path.read_text()
    return found


def require_intact(before: Kept, after: Kept) -> None:
    """Rows may only be added, and a step that succeeded is not run again."""
    for name, old in before.items():
        new = after.get(name)
        if isinstance(old, list):
            if not isinstance(new, list) or new[: len(old)] != old:
                raise AssertionError(f"gpu_dry: {name} has lost rows.")
        elif '"status": "ok"' in str(old) and new != old:
            raise AssertionError(f"gpu_dry: {name} was run again, or lost.")


def start(part: str, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.gpu_run", part, "--dry", "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def killed(part: str, out: Path, seconds: float) -> bool:
    """Runs `part` for so long, then kills it at once. False if it had ended by itself."""
    process = start(part, out)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def run(part: str, out: Path, kills: int, dice: random.Random) -> None:
    """`kills` killed runs of one command, then one to the end."""
    before: Kept = {}
    for _ in range(kills):
        seconds = dice.uniform(1.0, 15.0)
        cut = killed(part, out, seconds)
        after = kept(out)
        require_intact(before, after)
        rows = sum(len(found) for found in after.values() if isinstance(found, list))
        how = "killed" if cut else "done"
        print(f"{part}: {how} after {seconds:.1f} s with {rows} rows, all intact", flush=True)
        before = after
    process = start(part, out)
    if process.wait() != 0:
        logs = "\n".join(f"{p.name}:\n{p.read_text()[-2000:]}" for p in out.rglob("*.log"))
        code = process.returncode
        raise AssertionError(f"gpu_dry: {part} must succeed, got exit {code}.\n{logs}")
    require_intact(before, kept(out))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_dry",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--kills", type=int, default=2, help="killed runs of each (default 2)")
    parser.add_argument("--seed", type=int, help="of the moments (default: the clock)")
    arguments = parser.parse_args(argv)
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        out, results = Path(folder) / "out", Path(folder) / "results"
        for part in arguments.parts:
            run(part, out, arguments.kills, dice)
        lacking = gpu_records.write(out, results)
        written = sorted(str(p.relative_to(results)) for p in results.rglob("*.*"))
    print(f"records: {', '.join(written)}")
    if lacking and set(arguments.parts) == set(PARTS):
        raise AssertionError(f"gpu_dry: everything must be there, got none of: {lacking}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
