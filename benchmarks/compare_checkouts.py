"""Every kernel of this checkout against the same kernel of another one: has a change made any of
them slower?

python -m benchmarks.compare_checkouts ../before --name "one contract per op"

Both checkouts must be built. A process of its own measures each, in the order A B B A, through
the public functions alone; the ratio of a case is before / after, over the medians of each pair of
processes, so that 1.1 means a tenth faster. The record says whether the machine was busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

# A process that measures sees the package of its own checkout, so nothing of ours is imported here.
SAMPLES, SAMPLE_S = 7, 0.15


def _attention() -> Iterator[tuple[str, Callable[[], object]]]:
    from jepa_kernels import Rope3D, masked_attention

    heads, head_dim, grid = 6, 64, (8, 14, 14)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (16, 196, 1568):
            rows = [torch.randn(2, tokens, heads, head_dim).to(dtype) for _ in range(3)]
            options: dict[str, Any] = {"query_ids": torch.arange(tokens), "rope": Rope3D(grid)}
            yield from _both(
                f"masked_attention {tokens} tokens {dtype}".replace("torch.", ""),
                lambda q, k, v, o=options: masked_attention(q, k, v, **o),
                rows,
            )
        lengths = torch.tensor([0, 40, 340, 90, 470, 212])
        rows = [torch.randn(int(lengths.sum()), heads, head_dim).to(dtype) for _ in range(3)]
        ids = torch.cat([torch.randperm(1568)[:n].sort().values for n in lengths.tolist()])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        options = {"query_ids": ids, "rope": Rope3D(grid), "cu_seqlens_q": offsets}
        yield from _both(
            f"masked_attention packed {dtype}".replace("torch.", ""),
            lambda q, k, v, o=options: masked_attention(q, k, v, **o),
            rows,
        )


def _both(
    name: str, call: Callable[..., torch.Tensor], leaves: list[torch.Tensor]
) -> Iterator[tuple[str, Callable[[], object]]]:
    def forward() -> object:
        with torch.no_grad():
            return call(*leaves)

    yield f"{name} forward", forward
    tracked = [t.clone().requires_grad_() for t in leaves]
    grad = torch.randn_like(call(*tracked).detach())
    yield (
        f"{name} forward+backward",
        lambda: torch.autograd.grad(call(*tracked), tracked, grad),
    )


def _rollouts() -> Iterator[tuple[str, Callable[[], object]]]:
    from jepa_kernels import GRU, Hamiltonian, ResidualMLP, latent_rollout, latent_rollout_loss

    rows, width, hidden, steps = 1024, 768, 256, 4
    for dtype in (torch.float32, torch.bfloat16):

        def make(*shape: int, scale: float = 0.02, dtype: torch.dtype = dtype) -> torch.Tensor:
            return (scale * torch.randn(shape)).to(dtype)

        kind = str(dtype).removeprefix("torch.")
        states, targets = make(rows, width, scale=1.0), make(steps, rows, width, scale=1.0)
        mlp = [make(hidden, width), make(hidden), make(width, hidden), make(width)]
        yield from _both(
            f"latent_rollout mlp K {steps} {kind}",
            lambda z, *w: latent_rollout(z, ResidualMLP(*w), steps),
            [states, *mlp],
        )
        yield from _both(
            f"latent_rollout_loss mlp K {steps} {kind}",
            lambda z, *w, t=targets: latent_rollout_loss(z, ResidualMLP(*w), t),
            [states, *mlp],
        )
        energy = [make(hidden, width), make(hidden), make(hidden, hidden), make(hidden)]
        yield from _both(
            f"latent_rollout hamiltonian K {steps} {kind}",
            lambda z, *w: latent_rollout(z, Hamiltonian(*w), steps),
            [states, *energy, make(1, hidden)],
        )
        small, actions = 256, 8
        gates = 3 * small
        inputs = make(8, rows, actions, scale=1.0)
        gru = [make(gates, actions), make(gates, small), make(gates), make(gates)]
        yield from _both(
            f"latent_rollout gru K 8 {kind}",
            lambda z, *w, a=inputs: latent_rollout(z, GRU(*w), len(a), actions=a),
            [make(rows, small, scale=1.0), *gru, 1 + make(small), make(small)],
        )


def _lists() -> Iterator[tuple[str, Callable[[], object]]]:
    from jepa_kernels import ema_update_
    from jepa_kernels.nn import EMATeacher
    from jepa_kernels.optim import AdamWEMA

    block = [(384,), (1152, 384), (1152,), (384, 384), (384,), (1536, 384), (1536,), (384, 1536)]
    shapes = {"60 small": [(16, 16)] * 60, "ViT-S": block * 12}
    for name, sizes in shapes.items():
        targets, sources = ([0.02 * torch.randn(s) for s in sizes] for _ in range(2))
        yield (
            f"ema_update_ {name} float32",
            lambda t=targets, s=sources: ema_update_(t, s, 0.99),
        )
    half = [t.bfloat16() for t in targets]
    yield "ema_update_ ViT-S bfloat16", lambda: ema_update_(half, sources, 0.99)
    student = torch.nn.Module()
    student.weights = torch.nn.ParameterList(torch.nn.Parameter(t.clone()) for t in targets)
    for parameter in student.weights:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    optimizer = AdamWEMA(student.parameters(), lr=1e-4, teacher=EMATeacher(student, 0.999))
    yield "AdamWEMA.step ViT-S float32", optimizer.step


def measure() -> dict[str, float]:
    """Case -> median seconds of a call."""
    torch.manual_seed(0)
    found = {}
    for cases in (_attention, _rollouts, _lists):
        for name, call in cases():
            call()
            began = time.perf_counter()
            call()
            calls = max(1, round(SAMPLE_S / max(time.perf_counter() - began, 1e-6)))
            samples = []
            for _ in range(SAMPLES):
                began = time.perf_counter()
                for _ in range(calls):
                    call()
                samples.append((time.perf_counter() - began) / calls)
            found[name] = statistics.median(samples)
    return found


def measured(checkout: Path) -> dict[str, float]:
    """`measure` in a process that sees only `checkout`."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--measure"],
        env={**os.environ, "PYTHONPATH": str(checkout.resolve()), "PYTHONSAFEPATH": "1"},
        cwd=checkout,
        check=True,
        capture_output=True,
        text=True,
    )
    answer = json.loads(result.stdout.splitlines()[-1])
    if Path(answer["package"]) != checkout.resolve() / "jepa_kernels":
        raise RuntimeError(f"compare_checkouts: measured {answer['package']}, not {checkout}.")
    cases: dict[str, float] = answer["cases"]
    return cases


def commit(checkout: Path) -> str:
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=checkout,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def compare(before: Path, after: Path, rounds: int) -> list[dict[str, Any]]:
    """One record a case: seconds of both, and the ratio with the least and the greatest of the
    rounds."""
    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    for i in range(rounds):
        order = (before, after) if i % 2 == 0 else (after, before)
        first, second = (measured(checkout) for checkout in order)
        pairs.append((first, second) if i % 2 == 0 else (second, first))
        print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
    records = []
    for name in pairs[0][0]:
        ratios = [old[name] / new[name] for old, new in pairs]
        records.append(
            {
                "case": name,
                "before_s": statistics.median(old[name] for old, _ in pairs),
                "after_s": statistics.median(new[name] for _, new in pairs),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
            }
        )
    return records


def table(record: dict[str, Any]) -> str:
    lines = [
        f"**{record['name']}**: {record['before']} against {record['after']}, {record['threads']} "
        f"thread{'s' if record['threads'] > 1 else ''}, {record['rounds']} rounds"
        + (", on a busy machine" if record["busy"] else "")
        + ".",
        "",
        "| case | before, ms | after, ms | before / after |",
        "|---|---|---|---|",
    ]
    for case in record["cases"]:
        ratio = f"{case['ratio']:.2f} [{case['ratio_low']:.2f}, {case['ratio_high']:.2f}]"
        lines.append(
            f"| {case['case']} | {1e3 * case['before_s']:.3g} | {1e3 * case['after_s']:.3g} | "
            f"{ratio} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_checkouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, nargs="?", help="a built checkout")
    parser.add_argument("--name", default="a change", help="what lies between the two")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        import jepa_kernels

        package = str(Path(jepa_kernels.__file__).parent)
        print(json.dumps({"package": package, "cases": measure()}))
        return 0
    if options.before is None:
        parser.error("the other checkout must be given")
    from benchmarks.machine import REPOSITORY, RESULTS, busy, device_key, provenance
    from jepa.atomic import write_json

    shared = busy()
    cases = compare(options.before, REPOSITORY, options.rounds)
    record = {
        "name": options.name,
        "before": commit(options.before),
        "after": commit(REPOSITORY),
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "busy": shared or busy(),
        "environment": provenance(),
        "cases": cases,
    }
    path = RESULTS / device_key() / "checkouts.json"
    write_json(path, record)
    print(table(record))
    print(f"written to {path.relative_to(REPOSITORY)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
