"""pytest-benchmark rows for every op, comparable across commits; the paired ratio to each baseline
is extra information.

python -m pytest benchmarks/test_micro.py --benchmark-autosave
python -m pytest-benchmark compare
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import harness
from benchmarks.discovery import bench_names, comparisons_of

OPTIONS = harness.Options(quick=True)
PAIRED = harness.Settings(rounds=4, min_rounds=2, warmup=1, budget_s=2.0, measure_memory=False)
Key = tuple[str, str, str, str, str]


def _key(op: str, item: harness.Comparison) -> Key:
    return op, item.case, item.dtype, item.pass_name, item.backend


def _keys() -> list[Key]:
    keys: dict[Key, None] = {}
    for op in bench_names():
        comparisons = comparisons_of(op)
        for item in comparisons(OPTIONS) if comparisons is not None else ():
            keys[_key(op, item)] = None
    return list(keys)


@pytest.mark.parametrize("key", _keys(), ids=lambda key: "-".join(key).replace("/", "_"))
def test_op(key: Key, benchmark: Any) -> None:
    benchmark.group = f"{key[0]} {key[3]}"
    timed = False
    for item in comparisons_of(key[0])(OPTIONS):
        if _key(key[0], item) != key:
            continue
        if not timed:
            item.gate()
            benchmark.pedantic(item.candidate, rounds=7, warmup_rounds=1, iterations=1)
            timed = True
        record = harness.measure(key[0], item, PAIRED)
        benchmark.extra_info[f"ratio to {item.baseline}"] = {
            "median": record["ratio"],
            "interval": record["interval"],
        }
        benchmark.extra_info["device"] = record["device_key"]
    assert timed
