"""The measuring tools: gates refuse, intervals cover, records append, resolutions count."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_step, harness, machine, memory, plot, resolutions
from jepa.batch import Batch
from jepa_kernels.testing import DERIVED, FLOAT32_ROUNDED


def comparison(**changes: object) -> harness.Comparison:
    values: dict[str, object] = {
        "case": "toy",
        "dtype": "float32",
        "pass_name": "forward",
        "backend": "cpu",
        "baseline": "sleep",
        "candidate": lambda: time.sleep(0.001),
        "reference": lambda: time.sleep(0.004),
        "gate": lambda: None,
        "details": {},
    }
    return harness.Comparison(**(values | changes))


QUICK = harness.Settings(
    rounds=5, min_rounds=3, warmup=1, min_sample_s=0.0, budget_s=5.0, measure_memory=False
)


def test_a_failed_gate_gives_no_number() -> None:
    def wrong() -> None:
        raise harness.GateError("out: relative error must be at most 1e-5, got 1.")

    record = harness.measure("toy", comparison(gate=wrong), QUICK)
    assert record["status"] == "wrong" and "relative error" in record["reason"]
    assert not {"ratio", "candidate", "reference", "interval"} & set(record)


def test_ratio_is_baseline_over_ours_with_its_interval() -> None:
    record = harness.measure("toy", comparison(), QUICK)
    assert record["status"] == "ok" and record["samples"] == 5
    low, high = record["interval"]
    assert 1.2 < low <= record["ratio"] <= high
    assert (
        record["candidate"]["p20_ms"]
        <= record["candidate"]["median_ms"]
        <= record["candidate"]["p80_ms"]
    )
    for name in (
        "device",
        "driver",
        "torch",
        "triton",
        "cuda",
        "cpu_isa",
        "git_commit",
        "git_dirty",
        "seed",
        "time",
        "threads",
    ):
        assert name in record


def test_rounds_alternate() -> None:
    calls: list[str] = []
    harness.time_pair(
        lambda: calls.append("A"),
        lambda: calls.append("B"),
        harness.Settings(rounds=4, warmup=1, min_sample_s=0.0),
    )
    assert "".join(calls[4:]) == "ABBA" * 4


def test_cpu_time_does_not_count_waiting_and_needs_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        record = harness.measure("toy", comparison(), replace(QUICK, clock="cpu"))
        assert (
            record["clock"] == "cpu" and record["candidate"]["median_ms"] < 0.8
        )  # it sleeps for 1 ms
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="one thread"):
            harness.timer("cpu")
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="wall, cpu"):
        harness.timer("sundial")


def test_floor_is_the_larger_of_compute_and_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(machine, "peak_bandwidth", lambda *_: 1e9)
    assert harness.floor(comparison(flop=2e6, bytes=1e6), "cpu")["floor_ms"] == pytest.approx(2.0)
    assert harness.floor(comparison(flop=1e6, bytes=3e6), "cpu")["floor_ms"] == pytest.approx(3.0)
    assert harness.floor(comparison(), "cpu")["floor_ms"] is None


def test_bootstrap_interval_covers_the_median() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        low, high = harness.bootstrap_interval(
            rng.normal(1.0, 0.1, size=25), seed=seed, resamples=400
        )
        covered += low <= 1.0 <= high
    assert 50 <= covered <= 60
    assert harness.bootstrap_interval([2.0]) == (2.0, 2.0)


def test_require_close_sees_errors_shapes_and_nan() -> None:
    good = torch.ones(8)
    harness.require_close("out", good, good, rtol=FLOAT32_ROUNDED["rtol"])
    for bad in (good * 1.01, good[:4], good * float("nan")):
        with pytest.raises(harness.GateError):
            harness.require_close("out", bad, good, rtol=DERIVED["rtol"])


def test_forward_backward_returns_the_gradients() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 2)
    call = harness.forward_backward(lambda a, b: a @ b, [x, w], torch.ones(3, 2))
    grad_x, grad_w = call()
    assert torch.allclose(grad_x, torch.ones(3, 2) @ w.T) and torch.allclose(
        grad_w, x.T @ torch.ones(3, 2)
    )
    assert torch.equal(call()[0], grad_x)


def test_records_append_and_keep_history(tmp_path: Path) -> None:
    path = tmp_path / "device" / "toy.json"
    record = harness.measure("toy", comparison(), QUICK)
    harness.append_records(path, [record])
    harness.append_records(path, [record | {"ratio": 2.0}])
    rows = harness.load_records(path)
    assert len(rows) == 2 and json.loads(path.read_text())["schema"] == harness.SCHEMA_VERSION
    assert [row["ratio"] for row in harness.latest(rows)] == [2.0]
    assert [item.name for item in path.parent.iterdir()] == ["toy.json"]
    path.write_text('{"schema": 0, "records": []}')
    with pytest.raises(ValueError, match="schema"):
        harness.load_records(path)


def test_main_filters_lists_and_fails_on_a_wrong_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
        yield comparison(case="small")
        yield comparison(
            case="wrong",
            gate=lambda: harness.require_close(
                "out", torch.zeros(2), torch.ones(2), rtol=DERIVED["rtol"]
            ),
        )

    output = tmp_path / "out.json"
    assert (
        harness.main(
            "toy", comparisons, None, ["--quick", "--case", "small", "--output", str(output)]
        )
        == 0
    )
    assert len(harness.load_records(output)) == 1
    assert harness.main("toy", comparisons, None, ["--quick"]) == 1
    assert harness.main("toy", comparisons, None, ["--quick", "--backend", "nothing"]) == 2
    assert harness.main("toy", comparisons, None, ["--quick", "--list"]) == 0
    assert "wrong: out: relative error" in capsys.readouterr().out


def test_a_loss_is_shown() -> None:
    slow = comparison(candidate=lambda: time.sleep(0.004), reference=lambda: time.sleep(0.001))
    assert "LOSS" in harness.format_row(harness.measure("toy", slow, QUICK))


def test_peak_memory_sees_an_allocation() -> None:
    with memory.peak_memory("cpu") as peak:
        block = torch.ones(16 * 2**20)
        del block
    if peak.added_bytes is None:
        pytest.skip("this kernel does not let a process reset its memory high-water mark")
    assert 60 * 2**20 < peak.added_bytes < 90 * 2**20


def test_device_key_names_the_class_of_machine() -> None:
    key = machine.device_key("cpu")
    assert key == f"cpu-{machine.cores()}core-{machine.cpu_isa()}"
    assert machine.peak_flops("cpu") > 1e8 and machine.peak_bandwidth("cpu") > 1e8


SIZES = [
    ("224", 16, 1568),
    ("112", 16, 392),
    ("ucf101", 16, 2400),
    ("64x96", 8, 96),
    ("224", 1, 196),
]


@pytest.mark.parametrize(("text", "frames", "tokens"), SIZES)
def test_resolutions_count_tokens(text: str, frames: int, tokens: int) -> None:
    parsed = resolutions.parse_resolution(text)
    assert parsed.tokens(frames) == tokens
    assert resolutions.parse_resolution(parsed.name) == parsed


@pytest.mark.parametrize("text", ["", "224x", "axb", "100", "0", "1x2x3", "nosuch"])
def test_bad_resolutions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="resolution: "):
        resolutions.parse_resolution(text)


def test_frames_by_name_and_number() -> None:
    assert resolutions.parse_frames("16f") == 16 and resolutions.parse_frames("8") == 8
    with pytest.raises(ValueError, match="frames"):
        resolutions.parse_frames("many")
    with pytest.raises(ValueError, match="frames"):
        resolutions.Resolution(64, 64).grid(3)


def test_ratio_figure_draws_every_series(tmp_path: Path) -> None:
    records = []
    for baseline in ("sdpa", "eager"):
        for size in ("112", "224"):
            record = harness.measure(
                "toy",
                comparison(baseline=baseline, details={"resolution": size, "tokens": int(size)}),
                QUICK,
            )
            records.append(record)
    figure = plot.ratio_figure(records)
    axes = figure.axes[0]
    assert sorted(axes.get_legend_handles_labels()[1]) == ["against eager", "against sdpa"]
    assert any(line.get_ydata()[0] == 1.0 for line in axes.lines)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="at least one finished case"):
        plot.ratio_figure([])


def test_the_bench_of_masked_attention_names_its_cases(root: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_masked_attention",
        "--quick",
        "--list",
        "--backend",
        "torch",
    ]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    for word in (
        "rotation_sdpa",
        "padded_sdpa",
        "looped_sdpa",
        "own_dense_equal_flop",
        "forward+backward",
    ):
        assert word in done.stdout


def test_the_step_bench_compares_equal_losses_and_its_gate_bites() -> None:
    options = harness.Options(quick=True, backends=("torch",))
    first = next(bench_step.comparisons(options))
    first.gate()
    assert first.baseline == "published" and first.flop > 1e8
    state = bench_step.our_state("micro", "fp32", False, "cpu")
    published = bench_step.their_state(state, "micro", "float32", False, "cpu")
    given = bench_step.inputs(resolutions.parse_resolution("64"), options, truncate="batch_min")
    batch = Batch(given.clip, given.masks, bench_step.STEP)
    with torch.no_grad():
        published.predictor.predictor_proj.bias.add_(0.1)
    with pytest.raises(harness.GateError, match="loss: relative error"):
        bench_step.gate(state, published, batch, given, "float32", "torch")
