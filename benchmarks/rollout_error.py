"""How far a rollout drifts from the float64 reference with the number of steps: hidden space beside
state space, float32 and bfloat16.

    python -m benchmarks.rollout_error                 # JSON and PNG beside the records of this
    device python -m benchmarks.rollout_error --rows 64 --output drift.json

Every line starts from the same rounded states and weights as its float64 reference, so only the
arithmetic of the steps is measured:
||y_k - exact_k|| / ||exact_k|| over all rows. State space is the
cell stepped by eager PyTorch in the given dtype; hidden space is the op, which
keeps hidden states and sums in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import eager_rollout, harness, machine
from benchmarks.bench_latent_rollout import ACTIONS, HIDDEN, new_cell
from benchmarks.plot import INK, PALETTE, style
from jepa.atomic import write_text
from jepa_kernels import Hamiltonian, ResidualMLP, latent_rollout
from jepa_kernels.ops.latent_rollout.op import with_parameters

STEPS = (1, 2, 4, 8, 16, 32, 64)
CELLS = {"residual_mlp": 768, "hamiltonian": 768, "gru": 256}


def _eager_step(cell: Any) -> eager_rollout.Step:
    if isinstance(cell, ResidualMLP):
        return eager_rollout.mlp_step(cell)
    return (
        eager_rollout.hamiltonian_step(cell, False)
        if isinstance(cell, Hamiltonian)
        else eager_rollout.gru_cell_step(cell)
    )


def measure(kind: str, dtype: torch.dtype, rows: int, seed: int) -> dict[str, list[float]]:
    """Relative error of each line at every count of STEPS."""
    torch.manual_seed(seed)
    channels = CELLS[kind]

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    cell, states = new_cell(kind, channels, make), make(rows, channels)
    if kind == "residual_mlp":
        # Small moves, as a trained head of per-step changes makes them: large ones are chaotic, and
        # measure chaos.
        cell = with_parameters(
            cell, [p if i < 2 else p * 0.25 for i, p in enumerate(cell.parameters())]
        )
    actions = make(STEPS[-1], rows, ACTIONS) if kind == "gru" else None
    wide = with_parameters(cell, [p.double() for p in cell.parameters()])
    exact = latent_rollout(
        states.double(),
        wide,
        STEPS[-1],
        actions=None if actions is None else actions.double(),
        backend="reference",
    )
    lines = {
        "hidden space" if kind != "gru" else "the op": latent_rollout(
            states, cell, STEPS[-1], actions=actions
        ),
        "state space": eager_rollout.rollout(
            _eager_step(cell), states, STEPS[-1], actions, None, "states"
        ),
    }
    return {
        name: [
            float((y[k - 1].double() - exact[k - 1]).norm() / exact[k - 1].norm()) for k in STEPS
        ]
        for name, y in lines.items()
    }


def figure(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10.5, 3.8), dpi=130, layout="constrained")
    axes = drawn.subplots(1, len(CELLS), sharey=True)
    for panel, kind in zip(axes, CELLS, strict=True):
        style(panel)
        rows = [row for row in record["lines"] if row["cell"] == kind]
        for number, row in enumerate(rows):
            dashed = row["line"] == "state space"
            color = PALETTE[0] if row["dtype"] == "float32" else PALETTE[1]
            panel.plot(
                STEPS,
                row["error"],
                color=color,
                linestyle="--" if dashed else "-",
                marker="s" if dashed else "o",
                markersize=4,
                linewidth=1.6,
                label=f"{row['dtype']}, {row['line']}",
                zorder=3 + number,
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(STEPS, [str(k) for k in STEPS], fontsize=8)
        panel.set_xticks([], minor=True)
        panel.set_xlabel("steps K")
        panel.set_title(f"{kind}, D = {CELLS[kind]}", fontsize=10, loc="left", color=INK)
        panel.legend(fontsize=7, frameon=False, loc="best")
    axes[0].set_ylabel("relative error against float64")
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout_error",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file; the figure lies beside it (default: "
        "benchmarks/results/<device>/rollout_error.json)",
    )
    arguments = parser.parse_args(argv)
    lines = []
    for kind in CELLS:
        for dtype in (torch.float32, torch.bfloat16):
            for line, error in measure(kind, dtype, arguments.rows, arguments.seed).items():
                lines.append(
                    {
                        "cell": kind,
                        "dtype": str(dtype).removeprefix("torch."),
                        "line": line,
                        "error": error,
                    }
                )
                print(
                    f"{kind:<13} {lines[-1]['dtype']:<9} {line:<13}"
                    + "".join(f" {value:9.2e}" for value in error),
                    flush=True,
                )
    record = {
        "schema": harness.SCHEMA_VERSION,
        "steps": STEPS,
        "rows": arguments.rows,
        "hidden": HIDDEN,
        "seed": arguments.seed,
    }
    record |= {"lines": lines, **machine.provenance("cpu")}
    output = arguments.output or machine.RESULTS / machine.device_key("cpu") / "rollout_error.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(record, indent=1, sort_keys=True) + "\n")
    figure(record).savefig(output.with_suffix(".png"))
    print(f"record: {output}\nfigure: {output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
