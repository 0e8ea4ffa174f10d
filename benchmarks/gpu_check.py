"""One small call of every op x backend x dtype x direction, held to the float64 reference: the
first thing to ask of a new device. A line of records for each, as it ends.

    python -m benchmarks.gpu_check --device cuda --backend triton --share 0/8 --output checks.jsonl

Processes with different shares run side by side, so their Triton kernels compile side by side. Rows
that are in the output already are not made again.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_lines, machine
from benchmarks.gpu_lines import Row
from jepa_kernels.backend import OPS, BackendUnsupportedError
from jepa_kernels.ops.adamw_ema import TeacherLists, adamw_ema_
from jepa_kernels.ops.ema_update import ema_update_
from jepa_kernels.support import example, gap
from jepa_kernels.testing import (
    HEAD_DIMS,
    AttentionCase,
    assert_within_budget,
    attention_case,
    run_attention,
)
from jepa_kernels.testing.embedding import EmbeddingCase, embedding_case, run_embedding
from jepa_kernels.testing.gaussianity import (
    GaussianityCase,
    gaussianity_case,
    run_gaussianity,
)
from jepa_kernels.testing.rollout import OP_NAMES, RolloutCase, rollout_case, run_rollout

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
SIZES = ((31, 33), (1025,), (), (2, 3, 5, 7), (300_001,))
_CELL_OF = {op: cell for cell, op in OP_NAMES.items()}


@dataclass(frozen=True)
class Compared:
    """One result beside the float64 one; `peer` is the reference in the same dtype."""

    name: str
    actual: torch.Tensor
    oracle: torch.Tensor
    peer: torch.Tensor | None = None
    gradient: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Check:
    """One row to make."""

    op: str
    case: str
    dtype: torch.dtype
    direction: str
    backend: str
    run: Callable[[], list[Compared]]

    def names(self) -> Row:
        return {
            "op": self.op,
            "case": self.case,
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": self.direction,
            "backend": self.backend,
        }


def attention(case: AttentionCase, backend: str, device: str, direction: str) -> list[Compared]:
    oracle = run_attention(case, "reference", torch.float64)
    peer = run_attention(case, "reference") if case.dtype in HALF else None
    if direction == "forward":
        # Without gradients a call may take another path through the op.
        with torch.no_grad():
            actual = _attention_forward(case, backend, device)
    else:
        result = run_attention(case, backend, device=device)
        actual = {name: t for name, t in result.named() if name.startswith("grad")}
    return [
        Compared(
            name,
            tensor,
            getattr(oracle, name),
            None if peer is None else getattr(peer, name),
            name.startswith("grad"),
            case.dtype,
        )
        for name, tensor in actual.items()
    ]


def _attention_forward(case: AttentionCase, backend: str, device: str) -> dict[str, torch.Tensor]:
    from jepa_kernels import masked_attention

    inputs = (t.to(device=device, dtype=case.dtype) for t in (case.query, case.key, case.value))
    options = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.options().items()
    }
    out, lse = masked_attention(*inputs, **options, return_lse=True, backend=backend)
    return {"out": out.cpu(), "lse": lse.cpu()}


def compared(
    run: Callable[..., dict[str, torch.Tensor]],
    case: RolloutCase | GaussianityCase | EmbeddingCase,
    backend: str,
    device: str,
    direction: str,
) -> list[Compared]:
    """The results of one direction of `run_rollout`, `run_gaussianity` or `run_embedding`."""
    oracle = run(case, "reference", torch.float64)
    peer = run(case, "reference") if case.dtype in HALF else {}
    actual = run(case, backend, device=device)
    wanted = [n for n in actual if n.startswith("grad_") == (direction == "backward")]
    return [
        Compared(n, actual[n], oracle[n], peer.get(n), n.startswith("grad"), case.dtype)
        for n in wanted
    ]


def lists(dtype: torch.dtype, count: int) -> list[list[torch.Tensor]]:
    """Lists of the same sizes with different values, exact in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SIZES]
        for _ in range(count)
    ]


def ema(dtype: torch.dtype, rounding: str, backend: str, device: str) -> list[Compared]:
    """The rounded bits are part of the contract, so the reference in the same dtype is the
    oracle."""

    def moved(name: str, place: str) -> list[torch.Tensor]:
        targets, sources = ([t.to(place) for t in values] for values in lists(dtype, 2))
        lost = [torch.zeros_like(t) for t in targets]
        options = {
            "nearest": {},
            "kahan": {"compensations": lost},
            "stochastic": {"seed": 3},
        }[rounding]
        ema_update_(targets, sources, 0.9, rounding=rounding, backend=name, **options)
        return [t.cpu() for t in (*targets, *lost)]

    pairs = zip(moved(backend, device), moved("reference", "cpu"), strict=True)
    found = [Compared(f"list[{i}]", a, e.double(), e) for i, (a, e) in enumerate(pairs)]
    for item in found:
        # torch composes the average of products that it rounds in its own order.
        if backend != "torch" and not torch.equal(item.actual, item.peer):
            raise AssertionError(f"{item.name}: bits differ from the reference's")
    return found


def adamw(dtype: torch.dtype, backend: str, device: str) -> list[Compared]:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "targets")
    hyper = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.05, 0.0]], dtype=torch.float64)

    def stepped(name: str, place: str, kind: torch.dtype) -> dict[str, list[torch.Tensor]]:
        values = dict(zip(names, lists(dtype, 5), strict=True))
        values["exp_avg_sqs"] = [t.abs() + 0.1 for t in values["exp_avg_sqs"]]
        values = {n: [t.to(place, kind) for t in v] for n, v in values.items()}
        steps = [torch.tensor(3.0) for _ in SIZES]
        adamw_ema_(
            *(values[n] for n in names[:4]),
            steps,
            hyper=hyper,
            groups=[0] * len(SIZES),
            teacher=TeacherLists(values["targets"], 0.9),
            backend=name,
        )
        return {n: [t.cpu() for t in v] for n, v in values.items()}

    actual = stepped(backend, device, dtype)
    oracle = stepped("reference", "cpu", torch.float64)
    peer = stepped("reference", "cpu", dtype)
    return [
        Compared(f"{n}[{i}]", actual[n][i], oracle[n][i], peer[n][i])
        for n in names
        for i in range(len(SIZES))
    ]


def checks(device: str, backends: Sequence[str] = ()) -> Iterator[Check]:
    """Most valuable first."""
    for op in sorted(OPS, key=lambda name: name != "masked_attention"):
        wide = op == "masked_attention"
        for head_dim in (64, *(d for d in HEAD_DIMS if d != 64)) if wide else (0,):
            for dtype in DTYPES:
                for backend in wanted(op, device, backends):
                    if not gap(OPS[op], backend, dtype) and is_there(op, backend, device, dtype):
                        yield from _of_one(op, head_dim, dtype, backend, device)


def wanted(op: str, device: str, backends: Sequence[str]) -> list[str]:
    """Names of `op` to check on `device`: those asked for, or all that could run on such a one."""
    kernels = ("cpu", "torch") if device == "cpu" else ("cuda", "triton", "flash", "torch")
    return [b for b in OPS[op].priority if b in (backends or kernels)]


def is_there(op: str, backend: str, device: str, dtype: torch.dtype) -> bool:
    """False for flash where no library of others runs: it is nobody's duty to have one."""
    return backend != "flash" or not OPS[op].reasons(backend, example(OPS[op], device, dtype))


def _of_one(
    op: str, head_dim: int, dtype: torch.dtype, backend: str, device: str
) -> Iterator[Check]:
    make = partial(Check, op, dtype=dtype, backend=backend)
    if op == "masked_attention":
        shared = {"head_dim": head_dim, "dtype": dtype}
        forms = {
            "packed": attention_case((5, 0, 70), packed=True, slack=2, **shared),
            "dense": attention_case((37, 37), strided=True, layout="tiled", **shared),
            "cross": attention_case((9, 9), (210, 210), grid=(4, 8, 8), **shared),
        }
        for name, case in forms.items():
            if name == "packed" or head_dim in (64, 88):
                for direction in ("forward", "backward"):
                    run = partial(attention, case, backend, device, direction)
                    yield make(case=f"{name}/D{head_dim}", direction=direction, run=run)
    elif op in _CELL_OF:
        for output in ("last", "states", 2.0):
            case = rollout_case(_CELL_OF[op], output, dtype=dtype, channels=40, hidden=33)
            for direction in ("forward", "backward"):
                run = partial(compared, run_rollout, case, backend, device, direction)
                yield make(case=f"{output}", direction=direction, run=run)
    elif op == "sliced_gaussianity":
        for output in ("statistic", "sums"):
            case = gaussianity_case(300, 40, 70, output=output, dtype=dtype)
            for direction in ("forward", "backward"):
                run = partial(compared, run_gaussianity, case, backend, device, direction)
                yield make(case=output, direction=direction, run=run)
    elif op == "visible_patch_embed":
        shape = {"visible": None, "tubelet": (2, 16, 16), "width": 70, "dtype": dtype}
        for layout, clip_dtype in (("dense", torch.uint8), ("packed", torch.float32)):
            case = embedding_case(layout=layout, clip_dtype=clip_dtype, repeated=True, **shape)
            for direction in ("forward", "backward"):
                run = partial(compared, run_embedding, case, backend, device, direction)
                yield make(case=layout, direction=direction, run=run)
    elif op == "ema_update":
        roundings = ["nearest"]
        roundings += ["kahan"] if dtype in HALF else []
        roundings += ["stochastic"] if dtype == torch.bfloat16 else []
        for rounding in roundings:
            run = partial(ema, dtype, rounding, backend, device)
            yield make(case=rounding, direction="update", run=run)
    else:
        run = partial(adamw, dtype, backend, device)
        yield make(case="with a teacher", direction="update", run=run)


def made(check: Check, device: str) -> Row:
    """The record of one check. Whatever a device does wrong is a row, not the end of the run."""
    began = time.perf_counter()
    row = check.names() | {"device": device}
    try:
        results = check.run()
        errors = {}
        for r in results:
            finite = torch.isfinite(r.oracle)
            difference = (r.actual.double() - r.oracle)[finite].abs()
            errors[r.name] = float(difference.max()) if difference.numel() else 0.0
        row |= {"status": "ok", "errors": errors}
        for r in results:
            assert_within_budget(r.name, r.actual, r.oracle, r.peer, r.gradient, r.dtype)
    except BackendUnsupportedError as refusal:
        row |= {"status": "refused", "reason": str(refusal)}
    except AssertionError as wrong:
        row |= {"status": "wrong", "reason": str(wrong)}
    except Exception:
        row |= {"status": "failed", "reason": traceback.format_exc()[-4000:]}
    return row | {"seconds": round(time.perf_counter() - began, 3)}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--backend", action="append", default=[], help="default: all of the device")
    made.add_argument("--share", default="0/1", help="i/n: of n shares, the one numbered i")
    made.add_argument("--limit", type=int, help="the first so many checks of the share")
    made.add_argument("--output", type=Path, required=True)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)
    number, count = (int(part) for part in arguments.share.split("/"))
    rows = {_key(row): row for row in gpu_lines.read(arguments.output)}
    todo = list(checks(arguments.device, arguments.backend))[number::count][: arguments.limit]
    # What went wrong in an earlier run comes last: it may take the device with it again.
    todo.sort(key=lambda check: _key(check.names()) in rows)
    origin = machine.provenance(arguments.device)
    bad = 0
    for check in todo:
        if rows.get(_key(check.names()), {}).get("status") == "ok":
            continue
        row = made(check, arguments.device) | {"machine": origin}
        gpu_lines.append(arguments.output, row)
        bad += row["status"] != "ok"
        names = " ".join(str(v) for v in check.names().values())
        note = "" if row["status"] == "ok" else f": {row['reason'].splitlines()[-1]}"
        print(f"{names}: {row['status']}{note}", flush=True)
        if gpu_lines.device_is_lost(row):
            return 1
    return 1 if bad else 0


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[n] for n in ("op", "case", "dtype", "direction", "backend"))


if __name__ == "__main__":
    raise SystemExit(main())
