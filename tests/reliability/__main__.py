"""The whole run and its record.

    python -m tests.reliability --inputs 200000 --kills 1000

Exits with 1 when an input made a reader do anything but read or refuse, or a killed run ended with
other bits than one that was left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import PIL
import torch

from jepa.atomic import write_json
from tests.conftest import ROOT
from tests.reliability import fuzz

RECORD = ROOT / "benchmarks" / "results" / "reliability.json"
# Of a hundred kills, how many go to each kind of run.
SHARES = {"pretrain": 40, "finetune": 20, "probe": 15, "encode": 25}


def inputs(count: int, seed: int) -> dict[str, Any]:
    findings, seconds = fuzz.timed(0, count, seed)
    return {
        "inputs": findings.inputs,
        "seed": seed,
        "read": dict(sorted(findings.read.items())),
        "refused": dict(sorted(findings.refused.items())),
        "faults": findings.faults,
        "seconds": round(seconds, 1),
    }


def kills(count: int, folder: Path) -> dict[str, Any]:
    words = [f"{kind}={max(1, count * share // 100)}" for kind, share in SHARES.items()]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tests.jepa.killed_runs", str(folder), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    reports = json.loads(done.stdout)
    summary = {
        kind: {key: value for key, value in report.items() if key != "resumed_from"}
        for kind, report in reports.items()
    }
    return {
        "kills": sum(report["kills"] for report in reports.values()),
        "runs": summary,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--inputs", type=int, default=200_000, help="damaged files to read")
    parser.add_argument("--kills", type=int, default=1_000, help="kills of runs, over all kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--output", type=Path, default=RECORD, help="the record")
    options = parser.parse_args(arguments)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    record: dict[str, Any] = {
        "command": f"python -m tests.reliability --inputs {options.inputs} "
        f"--kills {options.kills} --seed {options.seed}",
        "commit": commit,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "av": av.__version__,
        "pillow": PIL.__version__,
    }
    if options.inputs:
        record["readers"] = inputs(options.inputs, options.seed)
    if options.kills:
        with tempfile.TemporaryDirectory() as folder:
            record["killed"] = kills(options.kills, Path(folder))
    write_json(options.output, record)
    faults = len(record.get("readers", {}).get("faults", ()))
    different = sum(
        len(run["different"]) for run in record.get("killed", {"runs": {}})["runs"].values()
    )
    print(
        f"{record.get('readers', {}).get('inputs', 0)} damaged files, {faults} faults; "
        f"{record.get('killed', {}).get('kills', 0)} kills, {different} differences; "
        f"wrote {options.output}"
    )
    return int(bool(faults or different))


if __name__ == "__main__":
    sys.exit(main())
