"""Paired timing of two implementations of one computation, with a gate, intervals and JSON records.

Interface for a `bench_<op>.py` file (keep it to cases, inputs and implementations):

    from benchmarks import harness

    def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
        for ...:  # lazily: the inputs of a case live only while it runs
            yield harness.Comparison(
                case="vit_b/224px/16f/dense",
                dtype="float32",
                pass_name="forward",  # or "forward+backward", "update", ...
                backend="cpu",
                baseline="sdpa",  # the name of what it is
                candidate=lambda: ...,  # calls without arguments: ours, then the baseline's
                reference=lambda: ...,
                # Raises GateError; then no number is recorded.
                gate=lambda: harness.require_close("out", ours, oracle, rtol=1e-5),
                flop=..., bytes=...,  # the floor
                details={"resolution": "224", "tokens": 1568},  # what plot.py groups by
            )

    if __name__ == "__main__":
        raise SystemExit(harness.main("masked_attention", comparisons, __doc__))

`harness.forward_backward(call, inputs, cotangent)` makes the zero-argument call for the
forward+backward pass. `options.quick`, `.backends`, `.baselines`, `.dtypes`, `.passes`, `.device`,
`.seed` come from the command line; filter with `options.wants(...)`.
A ratio is baseline time over our time, so above 1 means ours is faster. Records append to
benchmarks/results/<device>/<op>.json. `benchmarks/test_micro.py` finds every bench file by its
`comparisons` function and turns its quick cases into pytest-benchmark rows.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks import contention, machine
from benchmarks.memory import peak_memory
from jepa.atomic import write_text

SCHEMA_VERSION = 1


class GateError(AssertionError):
    """A result is wrong, so its speed is not worth a number."""


@dataclass(frozen=True)
class Comparison:
    """Two implementations of one case; see the module docstring. `flop` and `bytes` are of the
    algorithm, not of either side."""

    case: str
    dtype: str
    pass_name: str
    backend: str
    baseline: str
    candidate: Callable[[], object]
    reference: Callable[[], object]
    gate: Callable[[], None]
    flop: float | None = None
    bytes: float | None = None
    details: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How long to look. `budget_s` ends the rounds of one comparison early, never before
    `min_rounds`."""

    rounds: int = 12
    min_rounds: int = 4
    warmup: int = 2
    min_sample_s: float = 0.004
    budget_s: float = 20.0
    flush_cache: bool = False
    seed: int = 0
    measure_memory: bool = True
    clock: str = "wall"


@dataclass(frozen=True)
class Options:
    """What the command line asked for; empty tuples mean everything."""

    quick: bool = False
    backends: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    device: str = "cpu"
    seed: int = 0

    def wants(
        self,
        *,
        backend: str | None = None,
        baseline: str | None = None,
        dtype: str | None = None,
        pass_name: str | None = None,
    ) -> bool:
        pairs = (
            (backend, self.backends),
            (baseline, self.baselines),
            (dtype, self.dtypes),
            (pass_name, self.passes),
        )
        return all(value is None or not allowed or value in allowed for value, allowed in pairs)


def default_dtypes(
    device: str, *, on_gpu: tuple[str, ...] = ("float32", "bfloat16")
) -> tuple[str, ...]:
    """What is measured unless asked otherwise: on a CPU float32, and bfloat16 where it has
    instructions for its products (elsewhere torch's own products would take all the time)."""
    if torch.device(device).type != "cpu":
        return on_gpu
    return ("float32", "bfloat16") if machine.multiplies_bf16(device) else ("float32",)


def require_close(name: str, actual: torch.Tensor, expected: torch.Tensor, *, rtol: float) -> None:
    """Relative error in the 2-norm, ||actual - expected|| / ||expected||, judged in float64;
    non-finite values never pass."""
    if actual.shape != expected.shape:
        raise GateError(
            f"{name}: shape must be {tuple(expected.shape)}, got {tuple(actual.shape)}."
        )
    left, right = actual.detach().double(), expected.detach().double()
    if not bool(torch.isfinite(left).all()):
        raise GateError(f"{name}: values must be finite.")
    error = float((left - right).norm() / right.norm().clamp_min(1e-300))
    if error > rtol:
        raise GateError(f"{name}: relative error must be at most {rtol:.1e}, got {error:.2e}.")


def forward_backward(
    call: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: Sequence[torch.Tensor],
    cotangent: torch.Tensor,
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A zero-argument call that runs `call(*inputs)` and its gradient with respect to every
    floating-point input."""
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def run() -> tuple[torch.Tensor, ...]:
        output = call(*leaves)
        first = output[0] if isinstance(output, tuple) else output
        return torch.autograd.grad(first, wanted, cotangent)

    return run


def bootstrap_interval(
    samples: Sequence[float], *, seed: int = 0, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the median."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 1:
        return float(values[0]), float(values[0])
    picks = np.random.default_rng(seed).integers(0, values.size, size=(resamples, values.size))
    medians = np.median(values[picks], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


CLOCKS = ("wall", "cpu")


def timer(clock: str, device: torch.device | str = "cpu") -> Callable[[], float]:
    """Seconds by `clock`: "wall", or "cpu" for the CPU time of this process, which a busy machine
    does not inflate.

    CPU time is only comparable with one thread (waiting threads spin), so anything else is refused.
    """
    if clock == "wall":
        return time.perf_counter
    if clock != "cpu":
        raise ValueError(f"harness: clock must be one of {', '.join(CLOCKS)}, got {clock!r}.")
    if torch.device(device).type != "cpu" or torch.get_num_threads() != 1:
        raise ValueError(
            f"harness: clock 'cpu' must have one thread on a CPU, got {torch.get_num_threads()} "
            f"threads on {device}."
        )
    return time.process_time


class Clock:
    """Times `repeats` calls in a row: perf_counter on a CPU, CUDA events on a GPU. Optionally
    evicts the caches first."""

    def __init__(
        self, device: torch.device | str, *, flush_cache: bool = False, clock: str = "wall"
    ) -> None:
        self.device = torch.device(device)
        self._now = timer(clock, device)
        self._spill = torch.empty(0)
        if flush_cache:  # larger than any last-level cache of the two kinds of device
            self._spill = torch.zeros(
                (256 if self.device.type == "cuda" else 96) * 2**20,
                dtype=torch.uint8,
                device=self.device,
            )

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        if self._spill.numel():
            self._spill.add_(1)
        if self.device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(self.device)
            start.record()
            for _ in range(repeats):
                call()
            stop.record()
            torch.cuda.synchronize(self.device)
            return start.elapsed_time(stop) / 1e3 / repeats
        begin = self._now()
        for _ in range(repeats):
            call()
        return (self._now() - begin) / repeats


@dataclass(frozen=True)
class Pair:
    """Seconds of every A B B A round: (mean of the two A, mean of the two B).

    `busy` says that other programs had the cores in most rounds, also when repeated: the seconds
    are then not those of the code. `usage` is over all rounds, `contended_rounds` of which were
    measured again.
    """

    candidate_s: tuple[float, ...]
    reference_s: tuple[float, ...]
    repeats: int
    busy: bool = False
    contended_rounds: int = 0
    usage: contention.Usage = contention.NOTHING

    @property
    def ratios(self) -> list[float]:
        return [
            theirs / ours for ours, theirs in zip(self.candidate_s, self.reference_s, strict=True)
        ]

    @property
    def differences_s(self) -> list[float]:
        return [
            ours - theirs for ours, theirs in zip(self.candidate_s, self.reference_s, strict=True)
        ]


def time_pair(
    candidate: Callable[[], object],
    reference: Callable[[], object],
    settings: Settings,
    device: torch.device | str = "cpu",
) -> Pair:
    """Warm both sides, then rounds of A B B A in this process, so that drift of the machine hits
    both alike. A round in which other programs had the cores is measured again while the budget
    lasts."""
    clock = Clock(device, flush_cache=settings.flush_cache, clock=settings.clock)
    begin = time.perf_counter()
    for _ in range(max(1, settings.warmup)):
        candidate()
        reference()
        # Calls of seconds are warm after one.
        if time.perf_counter() - begin > settings.budget_s / 2:
            break
    slower = max(clock.seconds(candidate, 1), clock.seconds(reference, 1))
    repeats = (
        1
        if settings.flush_cache
        else max(1, min(200, round(settings.min_sample_s / max(slower, 1e-9))))
    )
    clean: list[tuple[float, float]] = []
    contended: list[tuple[float, float]] = []
    used = contention.NOTHING
    wanted = max(settings.rounds, settings.min_rounds)
    deadline = time.perf_counter() + settings.budget_s
    # CPU time is not inflated by waiting.
    judged = settings.clock == "wall"
    while len(clean) < wanted and len(clean) + len(contended) < 2 * wanted:
        done = len(clean) + len(contended)
        if done >= settings.min_rounds and time.perf_counter() > deadline:
            break
        watch = contention.Watch()
        first = clock.seconds(candidate, repeats)
        other = clock.seconds(reference, repeats) + clock.seconds(reference, repeats)
        last = clock.seconds(candidate, repeats)
        usage = watch.stop()
        used += usage
        kept = contended if judged and usage.contended else clean
        kept.append(((first + last) / 2, other / 2))
    busy = len(clean) < min(settings.min_rounds, wanted)
    rounds = clean + contended if busy else clean
    ours, theirs = zip(*rounds, strict=True)
    return Pair(ours, theirs, repeats, busy, len(contended), used)


def summarize(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile and minimum in milliseconds; a minimum far below the median
    tells of a busy machine."""
    best, low, middle, high = np.quantile(np.asarray(seconds) * 1e3, [0.0, 0.2, 0.5, 0.8])
    return {
        "median_ms": float(middle),
        "p20_ms": float(low),
        "p80_ms": float(high),
        "min_ms": float(best),
    }


def floor(comparison: Comparison, device: torch.device | str) -> dict[str, float | None]:
    """FLOP and bytes over the ceilings measured on this machine; the larger of the two is the least
    time this computation can take."""
    if comparison.flop is None and comparison.bytes is None:
        return {"flop": None, "bytes": None, "floor_ms": None}
    dtype = getattr(torch, comparison.dtype, torch.float32)
    compute = (
        0.0 if comparison.flop is None else comparison.flop / machine.peak_flops(str(device), dtype)
    )
    traffic = (
        0.0 if comparison.bytes is None else comparison.bytes / machine.peak_bandwidth(str(device))
    )
    return {
        "flop": comparison.flop,
        "bytes": comparison.bytes,
        "floor_ms": 1e3 * max(compute, traffic),
    }


def measure(
    op: str, comparison: Comparison, settings: Settings, device: torch.device | str = "cpu"
) -> dict[str, object]:
    """Gate, then time. Returns one record; a failed gate gives status "wrong" with its sentence and
    no times."""
    record: dict[str, object] = {
        "schema": SCHEMA_VERSION,
        "op": op,
        "case": comparison.case,
        "backend": comparison.backend,
        "baseline": comparison.baseline,
        "dtype": comparison.dtype,
        "pass": comparison.pass_name,
        "details": comparison.details,
        "seed": settings.seed,
        "flush_cache": settings.flush_cache,
        "clock": settings.clock,
        **machine.provenance(device),
    }
    try:
        comparison.gate()
    except GateError as error:
        return {**record, "status": "wrong", "reason": str(error)}
    pair = time_pair(comparison.candidate, comparison.reference, settings, device)
    ratios = pair.ratios
    interval = bootstrap_interval(ratios, seed=settings.seed)
    limits = floor(comparison, device)
    ours = summarize(pair.candidate_s)
    record |= {
        "status": "ok",
        "samples": len(ratios),
        "busy": pair.busy,
        "contention": {**pair.usage.as_dict(), "contended_rounds": pair.contended_rounds},
        "repeats_per_sample": pair.repeats,
        "ratio": statistics.median(ratios),
        "interval": list(interval),
        "candidate": ours,
        "reference": summarize(pair.reference_s),
        **limits,
        "floor_share": None
        if limits["floor_ms"] is None
        else limits["floor_ms"] / ours["median_ms"],
    }
    if settings.measure_memory:
        for side, call in (
            ("candidate", comparison.candidate),
            ("reference", comparison.reference),
        ):
            with peak_memory(device) as peak:
                kept = call()
                del kept
            record[f"{side}_peak_bytes"] = peak.added_bytes
        record["peak_how"] = peak.how
    return record


def append_records(path: Path, records: Sequence[dict[str, object]]) -> None:
    """Add records to a JSON file (an object with `schema` and `records`), atomically and under a
    lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        existing = load_records(path) if path.exists() else []
        rows = ",\n".join(json.dumps(row, sort_keys=True) for row in [*existing, *records])
        write_text(path, f'{{"schema": {SCHEMA_VERSION}, "records": [\n{rows}\n]}}\n')
    path.with_name(f".{path.name}.lock").unlink(missing_ok=True)


def load_records(path: Path) -> list[dict[str, object]]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("schema") != SCHEMA_VERSION:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"records: schema of {path} must be {SCHEMA_VERSION}, got {found}.")
    return content["records"]


def latest(records: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """The newest record of every (case, backend, baseline, dtype, pass); files keep the history."""
    newest: dict[tuple[object, ...], dict[str, object]] = {}
    for record in records:
        key = tuple(record[name] for name in ("op", "case", "backend", "baseline", "dtype", "pass"))
        newest[key] = record
    return list(newest.values())


def format_row(record: dict[str, object]) -> str:
    head = (
        f"{record['case']:<34} {record['dtype']:<9} {record['pass']:<17} "
        f"{record['backend']:>9} / {record['baseline']:<22}"
    )
    if record["status"] != "ok":
        return f"{head} {record['status']}: {record['reason']}"
    low, high = record["interval"]
    share = record["floor_share"]
    floor_text = "" if share is None else f"  {100 * share:5.1f} % of floor"
    mark = "" if low >= 1 else "  LOSS" if high < 1 else "  even"
    if record.get("busy"):
        mark = "  BUSY: other programs had the cores, these times say nothing"
    times = (
        f"{record['candidate']['median_ms']:9.3f} ms vs {record['reference']['median_ms']:9.3f} ms"
    )
    return f"{head} {record['ratio']:6.2f}x [{low:.2f}, {high:.2f}]  {times}{floor_text}{mark}"


def parser(op: str, description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.bench_{op}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    made.add_argument(
        "--quick", action="store_true", help="small cases and few rounds: a look, not a record"
    )
    made.add_argument(
        "--backend",
        action="append",
        default=[],
        help="our side; repeat for several (default: all that run here)",
    )
    made.add_argument(
        "--baseline",
        action="append",
        default=[],
        help="their side; repeat for several (default: all)",
    )
    made.add_argument(
        "--dtype",
        action="append",
        default=[],
        help="float32, bfloat16, ... (default: the case list's)",
    )
    made.add_argument(
        "--pass",
        dest="passes",
        action="append",
        default=[],
        help='"forward", "forward+backward" (default: all)',
    )
    made.add_argument(
        "--case",
        action="append",
        default=[],
        help="only cases whose name contains this text; repeat for several",
    )
    made.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one",
    )
    made.add_argument(
        "--rounds", type=int, help="A B B A rounds per comparison (default 12, quick 5)"
    )
    made.add_argument(
        "--budget",
        type=float,
        help="seconds per comparison after which rounds stop (default: 20 or what the bench says, "
        "quick 3)",
    )
    made.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    made.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: CPU time with --threads 1, for a busy machine (default wall)",
    )
    made.add_argument(
        "--flush-cache", action="store_true", help="evict the caches before every sample"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--output",
        type=Path,
        help="record file (default: benchmarks/results/<device>/<op>.json; none with --quick)",
    )
    made.add_argument("--list", action="store_true", help="print the case names and stop")
    return made


def _selected(
    comparisons: Iterator[Comparison], options: Options, cases: Sequence[str]
) -> Iterator[Comparison]:
    for item in comparisons:
        asked = options.wants(
            backend=item.backend, baseline=item.baseline, dtype=item.dtype, pass_name=item.pass_name
        )
        if asked and (not cases or any(text in item.case for text in cases)):
            yield item


def main(
    op: str,
    comparisons: Callable[[Options], Iterator[Comparison]],
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    min_rounds: int = 4,
    budget_s: float = 20.0,
) -> int:
    """Command line of one bench file, which may ask for fewer rounds of calls that take seconds.
    Returns 1 if any gate failed."""
    arguments = parser(op, description).parse_args(argv)
    options = Options(
        quick=arguments.quick,
        backends=tuple(arguments.backend),
        baselines=tuple(arguments.baseline),
        dtypes=tuple(arguments.dtype),
        passes=tuple(arguments.passes),
        device=arguments.device,
        seed=arguments.seed,
    )
    rounds = arguments.rounds if arguments.rounds is not None else (5 if options.quick else 12)
    budget = (
        arguments.budget if arguments.budget is not None else (3.0 if options.quick else budget_s)
    )
    settings = Settings(
        rounds=rounds,
        min_rounds=min(rounds, min_rounds),
        budget_s=budget,
        flush_cache=arguments.flush_cache,
        seed=options.seed,
        clock=arguments.clock,
    )
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    timer(settings.clock, options.device)
    output = arguments.output
    if output is None and not options.quick:
        output = machine.RESULTS / machine.device_key(options.device) / f"{op}.json"
    wrong = done = 0
    for comparison in _selected(comparisons(options), options, arguments.case):
        done += 1
        if arguments.list:
            print(
                f"{comparison.case} {comparison.dtype} {comparison.pass_name} "
                f"{comparison.backend} / {comparison.baseline}"
            )
            continue
        record = measure(op, comparison, settings, options.device)
        print(format_row(record), flush=True)
        wrong += record["status"] == "wrong"
        if output is not None:
            append_records(output, [record])
    if machine.busy():
        print(
            f"note: load average {os.getloadavg()[0]:.1f} on {machine.cores()} cores; absolute "
            "times are inflated, trust only wide ratios."
        )
    if not done:
        print(f"bench_{op}: nothing matches; run with --list and fewer filters.")
        return 2
    if output is not None and not arguments.list:
        print(f"records: {output}")
    return 1 if wrong else 0
