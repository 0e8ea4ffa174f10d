"""A machine that other programs use: samples that waited for a core are seen, measured again or
marked, and nothing is concluded from them; and the planner's rounds under a false clock."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from benchmarks import (
    contention,
    harness,
    optable,
    report,
    report_text,
    sweep,
    sweep_measure,
    sweep_plan,
    sweep_record,
    sweep_tables,
    workload,
)
from benchmarks.contention import NOTHING, Usage
from benchmarks.resolutions import parse_resolution
from jepa.models.sizes import SIZES
from jepa.variants import VARIANTS, variant

QUIET = Usage(1.0, 1.0, 3, 0.01, 0.5)
BUSY = Usage(1.0, 0.4, 200, 0.6, 6.0)


@pytest.fixture(autouse=True)
def _judged(monkeypatch):
    monkeypatch.setattr(contention, "WAITED_SHARE", 0.05)
    monkeypatch.setattr(contention, "SWITCHES_PER_S", 25.0)


def spin(seconds):
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        pass


def test_waiting_for_a_core_is_contention():
    assert BUSY.contended and not QUIET.contended
    assert Usage(1.0, 0.4, 200, None, 6.0).contended
    assert not Usage(1.0, 1.0, 9, None, 6.0).contended
    assert not Usage(0.004, 0.004, 1, 0.0009, 0.5).contended
    both = QUIET + BUSY
    assert (both.wall_s, both.switches, both.load) == (2.0, 203, 6.0)
    assert both.as_dict() == {
        "cpu_over_wall": 0.7,
        "waited_share": 0.305,
        "involuntary_switches": 203,
        "load": 6.0,
    }
    assert (NOTHING + QUIET) == QUIET


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs to pin processes to a core")
def test_a_program_on_the_same_core_is_seen():
    """Two loops pinned to one core: each waits about half of its time."""
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    others = [multiprocessing.get_context("fork").Process(target=spin, args=(20,)) for _ in "ab"]
    os.sched_setaffinity(0, {core})
    try:
        for other in others:
            other.start()
        _, usage = contention.watched(lambda: spin(0.5))
    finally:
        for other in others:
            other.kill()
            other.join()
        os.sched_setaffinity(0, before)
    assert usage.contended
    assert usage.cpu_s < 0.8 * usage.wall_s


def script(monkeypatch, usages):
    """Says in turn what samples used; the last again and again."""
    left = list(usages)

    class Watch:
        def stop(self):
            return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(contention, "Watch", Watch)
    return left


SETTINGS = harness.Settings(rounds=4, min_rounds=2, warmup=1, min_sample_s=0.0, budget_s=5.0)


def test_a_contended_round_is_measured_again(monkeypatch):
    script(monkeypatch, [QUIET, BUSY, BUSY, QUIET])
    pair = harness.time_pair(lambda: None, lambda: None, SETTINGS)
    assert (len(pair.ratios), pair.contended_rounds, pair.busy) == (4, 2, False)


def test_what_stays_contended_is_marked(monkeypatch, capsys):
    script(monkeypatch, [BUSY])
    pair = harness.time_pair(lambda: None, lambda: None, SETTINGS)
    assert pair.busy and pair.contended_rounds == len(pair.ratios) == 8
    item = harness.Comparison(
        "case", "float32", "forward", "cpu", "torch", lambda: None, lambda: None, lambda: None
    )
    record = harness.measure("op", item, SETTINGS)
    assert record["busy"] and record["contention"]["contended_rounds"] == 8
    json.dumps(record)
    assert "BUSY" in harness.format_row(record) and "LOSS" not in harness.format_row(record)
    text = optable.text([record])
    assert "busy: in 1 of 1 rows other programs had the cores" in text
    script(monkeypatch, [QUIET])
    record = harness.measure("op", item, SETTINGS)
    assert not record["busy"] and "busy" not in optable.text([record]).lower()


def test_cpu_time_is_not_judged(monkeypatch):
    script(monkeypatch, [BUSY])
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = harness.Settings(rounds=3, min_rounds=2, clock="cpu", budget_s=5.0)
        pair = harness.time_pair(lambda: spin(1e-4), lambda: spin(1e-4), settings)
    finally:
        torch.set_num_threads(threads)
    assert not pair.busy


def side(name="a"):
    return sweep_measure.Side("frozen", None, name, lambda number: {"all": 1.0 + number}, {}, 0.0)


def test_rounds_of_a_sweep_are_measured_again_or_marked(monkeypatch):
    sides = [side("a"), side("b")]
    # Four samples a round: the second round is contended.
    script(monkeypatch, [QUIET] * 4 + [BUSY] * 4 + [QUIET])
    sweep_measure.time_sides(sides, 2, 60.0)
    assert [s.rounds for s in sides] == [[1.0, 3.0]] * 2
    assert not any(s.busy for s in sides)
    sides = [side("a"), side("b")]
    script(monkeypatch, [BUSY])
    sweep_measure.time_sides(sides, 2, 60.0)
    assert all(s.busy and len(s.rounds) == 4 for s in sides)


@pytest.fixture
def sample(root):
    path = root / "tests" / "benchmarks" / "sweep_sample.json"
    return sweep_record.load(path)


def test_nothing_is_concluded_from_busy_cells(sample, tmp_path):
    quiet = report_text.findings(sample)
    assert not any("had the cores" in sentence for sentence in quiet)
    marked = copy.deepcopy(sample)
    largest = marked["sizes"][-1]["resolution"]
    for row in (*marked["measured"], *marked["objectives"]):
        row["busy"] = row["resolution"] == largest
    marked["cells"] = sweep_record.assemble(marked)
    marked["fits"] = sweep_record.fits(marked["cells"])
    busy = [cell for cell in marked["cells"] if cell.get("busy")]
    assert busy and {cell["resolution"] for cell in busy} == {largest}
    for fit in marked["fits"]:
        assert len(fit["tokens"]) == len(marked["sizes"]) - 1
    sentences = report_text.findings(marked)
    assert f"{largest} px" not in " ".join(sentences[:-1])
    note = sentences[-1]
    assert note.startswith(f"Busy: in {len(busy)} of ") and "no sentence" in note
    assert "busy" in sweep_tables.summary(marked)
    page = report.write(marked, tmp_path / "page.html", source=tmp_path / "sweep.json")
    assert note in page.read_text().replace("&#x27;", "'") and " busy<" in page.read_text()
    everything = copy.deepcopy(marked)
    for row in (*everything["measured"], *everything["objectives"]):
        row["busy"] = True
    everything["cells"] = sweep_record.assemble(everything)
    everything["fits"] = sweep_record.fits(everything["cells"])
    assert everything["fits"] == [] and len(report_text.findings(everything)) == 1
    sweep_tables.summary(everything)


def planned(monkeypatch, budget, cost, rounds=5):
    """What a sweep of the default list measures under a clock that only measuring moves; `cost`
    gives the seconds of so many rounds at a size."""
    now = [0.0]
    asked = []
    monkeypatch.setattr(sweep_plan.time, "perf_counter", lambda: now[0])
    arguments = sweep.parser().parse_args(["--budget", str(budget), "--rounds", str(rounds)])
    names = {name: variant(name) for name in VARIANTS}
    record = {"peak_flops": 1e11, "sizes": [], "measured": []}
    plan = sweep_plan.Plan(record, names, arguments)
    todo = [
        workload.Workload(parse_resolution(name), SIZES["micro"], batch=2)
        for name in arguments.resolutions
    ]

    def measure(work, count):
        spent = cost(work.resolution.name, count)
        now[0] += spent
        asked.append((work.resolution.name, count))
        record["sizes"].append({"resolution": work.resolution.name})
        plan.learn(work, count, spent)

    left = []
    for work in todo:
        if plan.refusal(work) is None:
            measure(work, 1)
        else:
            left.append(work.resolution.name)
    for number, work in enumerate(todo):
        count, _ = plan.more_rounds(todo[number:])
        if count > 1:
            measure(work, count)
    return asked, left, now[0]


# Seconds of one round and of each further one, per size: the quiet machine on which the guess of
# 14, 30 and 70 s met 43, 67 and 81, and ones three times slower and faster.
ROUNDS = {"64": (17.0, 6.5), "112": (25.0, 10.0), "160": (33.0, 12.0), "224": (75.0, 30.0)}


@pytest.mark.parametrize("speed", [0.3, 1.0, 1.7])
def test_no_size_is_left_out_where_the_budget_suffices_for_one_round(monkeypatch, speed):
    def cost(name, count):
        first, more = ROUNDS[name]
        return speed * (first + (count - 1) * more)

    budget = 360.0
    least = sum(cost(name, 1) for name in ROUNDS)
    assert least < budget
    asked, left, spent = planned(monkeypatch, budget, cost)
    assert left == []
    assert asked[:4] == [(name, 1) for name in ("64", "112", "160", "224")]
    assert spent <= budget
    # What is left of the budget becomes rounds.
    assert len(asked) > 4 or spent + cost("64", 2) > 0.8 * budget


def test_what_cannot_fit_is_left_out_and_named(monkeypatch):
    _, left, _ = planned(monkeypatch, 20.0, lambda name, count: 15.0 * count)
    assert left == ["112", "160", "224"]


def test_threads_wait_asleep_where_processes_are_started(root):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    for module in ("benchmarks", "jepa.cli"):
        code = f"import os, {module}; print(os.environ['OMP_WAIT_POLICY'])"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "passive\n"
        kept = subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={**environment, "OMP_WAIT_POLICY": "active"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert kept.stdout == "active\n"


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs to pin processes to cores")
def test_beside_two_busy_loops_the_main_job_agrees_or_says_busy(root, tmp_path):
    """The command itself on two cores, alone and beside a loop on either core."""
    cores = sorted(os.sched_getaffinity(0))[:2]

    def swept(name):
        path = tmp_path / f"{name}.json"
        size = ["--variants", "baseline,ld", "--resolutions", "48", "--frames", "8"]
        how = ["--rounds", "3", "--threads", "2", "--budget", "3600", "--no-report"]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.sweep", *size, *how, "--output", str(path)],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        cells = [cell for cell in sweep_record.load(path)["cells"] if cell["status"] == "ok"]
        assert cells
        assert ("busy: in " in done.stdout) == any(cell["busy"] for cell in cells)
        return cells

    def loop(core):
        os.sched_setaffinity(0, {core})
        spin(3600)

    alone = swept("alone")
    loops = [multiprocessing.get_context("fork").Process(target=loop, args=(c,)) for c in cores]
    try:
        for other in loops:
            other.start()
        beside = swept("beside")
    finally:
        for other in loops:
            other.kill()
            other.join()
    assert any(cell["busy"] for cell in beside)
    for quiet, cell in zip(alone, beside, strict=True):
        (low, high), (least, most) = quiet["interval_ms"], cell["interval_ms"]
        assert quiet["busy"] or cell["busy"] or (least <= high and low <= most)
