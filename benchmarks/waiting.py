"""What it costs that OpenMP's threads sleep while they wait, instead of spinning.

    python -m benchmarks.waiting

A few parallel regions are timed in child processes, in the order passive, active, active, passive,
so that a drift of the machine falls on both. Under two minutes; appends a record to waiting.json of
the machine's folder. On a quiet machine: beside another program spinning threads lose far more than
they gain, and the record says that it was busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import jepa_kernels
from benchmarks import contention, harness, machine, parameter_lists

ORDER = ("passive", "active", "active", "passive")
# Of one child.
SECONDS = 16.0
Sample = dict[str, dict[str, Any]]


def attention(px: int) -> Callable[[], object]:
    """Forward and backward over the tokens of a clip of 16 frames, six heads."""
    grid = (8, px // 16, px // 16)
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v = (torch.randn(1, tokens, 6, 64, requires_grad=True) for _ in range(3))
    ids, rope = torch.arange(tokens), jepa_kernels.Rope3D(grid)
    grad = torch.randn(1, tokens, 6, 64)

    def call() -> object:
        out = jepa_kernels.masked_attention(q, k, v, query_ids=ids, rope=rope)
        return torch.autograd.grad(out, (q, k, v), grad)

    return call


def teacher(encoder: str) -> Callable[[], object]:
    targets, sources = (parameter_lists.draw(encoder, torch.float32, "cpu") for _ in range(2))
    return lambda: jepa_kernels.ema_update_(targets, sources, 0.99)


def layer(tokens: int, width: int) -> Callable[[], object]:
    """torch's own product and GELU, as between two of our ops in a block."""
    x, weight = torch.randn(tokens, width), torch.randn(4 * width, width)
    return lambda: F.gelu(F.linear(x, weight))


WORK: dict[str, Callable[[], Callable[[], object]]] = {
    "attention, 64 px": lambda: attention(64),
    "attention, 112 px": lambda: attention(112),
    "teacher, micro": lambda: teacher("micro"),
    "teacher, vit_s": lambda: teacher("vit_s"),
    "linear and GELU, 128 x 384": lambda: layer(128, 384),
}


def timed(seconds: float) -> Sample:
    """Median seconds of one call of each workload here, and whether cores were shared."""
    found: Sample = {}
    for name, make in WORK.items():
        call = make()
        for _ in range(3):
            call()
        watch, samples, began = contention.Watch(), [], time.perf_counter()
        while time.perf_counter() - began < seconds / len(WORK) or not samples:
            before = time.perf_counter()
            call()
            samples.append(time.perf_counter() - before)
        usage = watch.stop()
        found[name] = {"seconds": statistics.median(samples), "busy": usage.contended}
    return found


def child(policy: str, seconds: float) -> Sample:
    """The same in a process of its own: the policy is read when OpenMP is loaded."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.waiting", "--child", "--seconds", str(seconds)],
        cwd=machine.REPOSITORY,
        env={**os.environ, "OMP_WAIT_POLICY": policy},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def compared(samples: Sequence[tuple[str, Sample]]) -> list[dict[str, Any]]:
    """One row for each workload: seconds under either policy, passive over active, and the least
    and largest ratio of a passive process to an active one."""
    rows = []
    for name in WORK:
        by_policy = {
            policy: [found[name]["seconds"] for of, found in samples if of == policy]
            for policy in ("passive", "active")
        }
        ratios = [a / b for a in by_policy["passive"] for b in by_policy["active"]]
        rows.append(
            {
                "case": name,
                "seconds": by_policy,
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "busy": any(found[name]["busy"] for _, found in samples),
            }
        )
    return rows


def text(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'workload':28s} {'passive ms':>10s} {'active ms':>10s}   passive / active"]
    for row in rows:
        passive, active = (
            1e3 * statistics.median(row["seconds"][policy]) for policy in ("passive", "active")
        )
        low, high = row["ratio_range"]
        said = f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]" + ("  busy" if row["busy"] else "")
        lines.append(f"{row['case']:28s} {passive:10.3f} {active:10.3f}   {said}")
    if any(row["busy"] for row in rows):
        lines.append("busy: other programs had the cores; the row says nothing of the policy")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.waiting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each child process")
    parser.add_argument("--output", type=Path, help="another file for the record")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.child:
        print(json.dumps(timed(chosen.seconds)))
        return 0
    rows = compared([(policy, child(policy, chosen.seconds)) for policy in ORDER])
    print(text(rows))
    path = chosen.output or machine.RESULTS / machine.device_key() / "waiting.json"
    harness.append_records(path, [{**row, **machine.provenance()} for row in rows])
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
