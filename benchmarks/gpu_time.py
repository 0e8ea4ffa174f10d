"""Seconds of every op on a GPU under CUDA-graph replay, ours beside everyone else's, a line of
records for each.

    python -m benchmarks.gpu_time --device cuda --topic attention --output attention.jsonl
    python -m benchmarks.gpu_time --device cuda --warm --share 0/8      compiles, times nothing

All sides of one case are timed in turns (A B C, C B A) in one process. Replay leaves out what a
call costs on the host; `launch_s` is that cost, apart. On a CPU calls are timed as they are.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import gpu_lines, harness, machine
from benchmarks.gpu_cases import TOPICS, Call, NotHere, Side, Task, tasks
from benchmarks.gpu_lines import Row
from benchmarks.memory import peak_memory

ROUNDS, SAMPLE_S = 6, 0.004


def captured(call: Call, device: str) -> tuple[Call, str, object]:
    """(what repeats the call, how it does, what must stay alive meanwhile). A call that a graph
    cannot record is repeated as it is."""
    if torch.device(device).type != "cuda":
        return call, "calls", None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return call, f"calls, since no graph records them: {str(error).splitlines()[0]}", None
    return graph.replay, "graph", (graph, kept)


@dataclass
class _Timed:
    side: Side
    row: Row
    repeat: Call
    kept: object
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)


def prepared(task: Task, side: Side, device: str) -> _Timed | Row:
    """A side ready to be timed, or the row that says why it cannot be."""
    row = task.names() | {"side": side.name, "ours": side.ours}
    try:
        if side.gate is not None:
            side.gate()
        call = side.build()
        call()
        with peak_memory(device) as peak:
            kept = call()
            del kept
        row["peak_bytes"] = peak.added_bytes
        row["launch_s"] = launch_seconds(call, device)
        repeat, row["how"], alive = captured(call, device)
    except NotHere as reason:
        return row | {"status": "not here", "reason": str(reason)}
    except harness.GateError as wrong:
        return row | {"status": "wrong", "reason": str(wrong)}
    except Exception:
        return row | {"status": "failed", "reason": traceback.format_exc()[-3000:]}
    return _Timed(side, row, repeat, alive)


def launch_seconds(call: Call, device: str, repeats: int = 10) -> float | None:
    """Host seconds of one call, the device's work left out; None where host and device are one."""
    if torch.device(device).type != "cuda":
        return None
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    torch.cuda.synchronize()
    return best


def measure(task: Task, device: str, rounds: int = ROUNDS) -> Iterator[Row]:
    """One row for each side."""
    clock, timed = harness.Clock(device), []
    for side in task.sides:
        found = prepared(task, side, device)
        if isinstance(found, _Timed):
            timed.append(found)
        else:
            yield _completed(found, task, device)
    for item in timed:
        item.repeat()
        once = clock.seconds(item.repeat, 1)
        item.repeats = max(1, min(200, round(SAMPLE_S / max(once, 1e-9))))
    for _ in range(rounds):
        for item in (*timed, *reversed(timed)):
            item.seconds.append(clock.seconds(item.repeat, item.repeats))
    for item in timed:
        # Both samples of a round make one, so that drift hits all sides alike.
        pairs = [sum(item.seconds[i : i + 2]) / 2 for i in range(0, len(item.seconds), 2)]
        times = {"status": "ok", "seconds": harness.summarize(pairs), "samples": pairs}
        yield _completed(item.row | times, task, device)


def _completed(row: Row, task: Task, device: str) -> Row:
    extra = {"flop": task.flop, "bytes": task.bytes, "details": task.details}
    return row | extra | {"machine": machine.provenance(device)}


def warm(share: str, device: str, quick: bool) -> None:
    """Calls every side of every task of the share once, so that what compiles is in the caches."""
    number, count = (int(part) for part in share.split("/"))
    place = 0
    for topic in TOPICS:
        for task in tasks(topic, device, quick):
            for side in task.sides:
                place += 1
                if place % count != number:
                    continue
                began = time.perf_counter()
                try:
                    side.build()()
                    note = "compiled"
                except Exception as error:  # the timed run says it again, and keeps the trace
                    note = repr(error)[:200]
                seconds = time.perf_counter() - began
                names = " ".join(str(v) for v in task.names().values())
                print(f"{names} {side.name}: {note} {seconds:.1f} s", flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_time",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--topic", choices=TOPICS, action="append", default=[])
    made.add_argument("--quick", action="store_true", help="tiny cases: a look, not a record")
    made.add_argument("--rounds", type=int, default=ROUNDS)
    made.add_argument("--warm", action="store_true", help="compile what would be timed, and stop")
    made.add_argument("--share", default="0/1", help="with --warm, i/n")
    made.add_argument("--output", type=Path, help="rows that are there already are not made again")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    torch.set_float32_matmul_precision("highest")
    if arguments.warm:
        warm(arguments.share, arguments.device, arguments.quick)
        return 0
    if arguments.output is None:
        parser().error("--output must be given")
    # What others cannot do here, they cannot do a second time either.
    earlier = gpu_lines.read(arguments.output)
    done = {
        _key(row)
        for row in earlier
        if row["status"] == "ok" or not row["ours"] or gpu_lines.device_is_lost(row)
    }
    bad = 0
    for topic in arguments.topic or TOPICS:
        for task in tasks(topic, arguments.device, arguments.quick):
            if all(_key(task.names() | {"side": side.name}) in done for side in task.sides):
                continue
            for row in measure(task, arguments.device, arguments.rounds):
                gpu_lines.append(arguments.output, row)
                bad += row["status"] in ("wrong", "failed") and row["ours"]
                print(text(row), flush=True)
                if gpu_lines.device_is_lost(row):
                    return 1
    return 1 if bad else 0


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("op", "case", "dtype", "pass", "side"))


def text(row: Row) -> str:
    head = f"{row['op']} {row['case']} {row['dtype']} {row['pass']} {row['side']:24}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason'].strip().splitlines()[-1]}"
    median = row["seconds"]["median_ms"]
    rate = "" if row["flop"] is None else f"  {row['flop'] / median / 1e9:7.1f} TFLOP/s"
    if row["flop"] is None and row["bytes"] is not None:
        rate = f"  {row['bytes'] / median / 1e6:7.0f} GB/s"
    launch = "" if row["launch_s"] is None else f"  launch {1e6 * row['launch_s']:.0f} us"
    return f"{head} {median:9.4f} ms{rate}{launch}  ({row['how']})"


if __name__ == "__main__":
    raise SystemExit(main())
