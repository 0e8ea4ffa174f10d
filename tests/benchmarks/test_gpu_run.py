"""The GPU run without a GPU: the driver's promises (order, side by side, limits, resuming, kills),
the lines it keeps, and what becomes of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import (
    gpu_build,
    gpu_check,
    gpu_dry,
    gpu_lines,
    gpu_records,
    gpu_run,
    gpu_time,
    preference_rows,
    sweep,
)
from benchmarks.gpu_run import Step, run, status_of
from jepa_kernels.backend import OPS

APPEND = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks import gpu_lines
path = Path({path!r})
done = len(gpu_lines.read(path))
for number in range(done, {rows}):
    gpu_lines.append(path, {{"number": number}})
    time.sleep({pause})
"""


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def appends(root: Path, path: Path, rows: int = 3, pause: float = 0.0) -> tuple[str, ...]:
    return python(APPEND.format(root=str(root), path=str(path), rows=rows, pause=pause))


def began(folder: Path, step: str) -> tuple[float, float]:
    """When a step that prints the time started and ended."""
    lines = (folder / f"{step}.log").read_text().split("\n")
    first, last = (float(line) for line in lines if line and line[0].isdigit())
    return first, last


TIMES = python("import time; print(time.time()); time.sleep(0.4); print(time.time())")


def test_steps_run_side_by_side_alone_and_after_one_another(tmp_path):
    steps = [
        Step("a", TIMES, 20),
        Step("b", TIMES, 20),
        Step("c", TIMES, 20, after=("a",)),
        Step("d", TIMES, 20, alone=True),
    ]
    assert run(steps, tmp_path, beside=2)
    a, b, c, d = (began(tmp_path, name) for name in "abcd")
    assert a[0] < b[1]
    assert b[0] < a[1], "side by side"
    assert c[0] >= a[1]
    assert d[0] >= max(b[1], c[1]), "alone"


def test_failures_and_limits_are_records_and_stop_nothing(tmp_path, capsys):
    steps = [
        Step("fails", python("raise SystemExit(3)"), 20),
        Step("hangs", python("import time; time.sleep(60)"), 0.5),
        Step("lacks", ("a-tool-that-is-not-here",), 20),
        Step("works", python("print('hello')"), 20, after=("fails", "hangs", "lacks")),
    ]
    assert not run(steps, tmp_path, beside=4)
    found = {step.name: status_of(tmp_path, step.name) for step in steps}
    assert (found["fails"]["status"], found["fails"]["exit"]) == ("failed", 3)
    assert found["hangs"]["status"] == "out of time"
    assert found["hangs"]["seconds"] < 10
    assert found["lacks"]["status"] == "a-tool-that-is-not-here is not here"
    assert found["works"]["status"] == "ok"
    assert "hello" in (tmp_path / "works.log").read_text()


def test_the_limit_ends_the_command_and_the_next_one_goes_on(tmp_path, root, capsys):
    path = tmp_path / "rows.jsonl"
    steps = [
        Step("slow", appends(root, path, rows=40, pause=0.1), 60),
        Step("late", python("pass"), 60, after=("slow",)),
    ]
    start = time.monotonic()
    assert not run(steps, tmp_path, limit_s=3.5)
    assert time.monotonic() - start < 6
    assert status_of(tmp_path, "slow")["status"] == "out of time"
    assert status_of(tmp_path, "late") is None
    assert "no time left for: late" in capsys.readouterr().out
    assert 0 < len(gpu_lines.read(path)) < 40
    assert run(steps, tmp_path, limit_s=60)
    assert [row["number"] for row in gpu_lines.read(path)] == list(range(40))
    stamps = (tmp_path / "slow.status.json").stat().st_mtime_ns
    assert run(steps, tmp_path)
    assert (tmp_path / "slow.status.json").stat().st_mtime_ns == stamps, "not run again"


def test_a_kill_at_any_moment_leaves_what_was_done(tmp_path, root):
    """The command and its steps die at once; what had ended is intact, and the rest is done by the
    same command."""
    commands = [appends(root, tmp_path / f"{i}.jsonl", 8, 0.02) for i in range(6)]
    script = f"""
import sys
sys.path.insert(0, {str(root)!r})
from pathlib import Path
from benchmarks.gpu_run import Step, run
steps = [Step(str(i), command, 20) for i, command in enumerate({commands!r})]
raise SystemExit(0 if run(steps, Path({str(tmp_path)!r}), beside=2) else 1)
"""
    dice, before = random.Random(5), {}
    for _ in range(4):
        process = subprocess.Popen(python(script), start_new_session=True)
        time.sleep(dice.uniform(0.1, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        after = gpu_dry.kept(tmp_path)
        gpu_dry.require_intact(before, after)
        before = after
    assert subprocess.run(python(script), timeout=60, check=False).returncode == 0
    gpu_dry.require_intact(before, gpu_dry.kept(tmp_path))
    for number in range(6):
        rows = gpu_lines.read(tmp_path / f"{number}.jsonl")
        assert [row["number"] for row in rows] == list(range(8))


def test_lost_rows_and_repeated_steps_are_noticed():
    before = {"a.jsonl": [{"n": 1}], "b.status.json": '{"status": "ok"}'}
    gpu_dry.require_intact(before, {**before, "a.jsonl": [{"n": 1}, {"n": 2}]})
    for after in ({**before, "a.jsonl": []}, {**before, "b.status.json": "{}"}, {}):
        with pytest.raises(AssertionError, match="lost"):
            gpu_dry.require_intact(before, after)


def test_a_fragment_of_a_killed_write_costs_its_own_row_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    gpu_lines.append(path, {"n": 1})
    with open(path, "a") as file:
        file.write('{"n": 2, "cut o')
    gpu_lines.append(path, {"n": 3})
    assert gpu_lines.read(path) == [{"n": 1}, {"n": 3}]
    assert gpu_lines.read(tmp_path / "absent.jsonl") == []


def test_commands_fit_their_time_and_are_understood(tmp_path, monkeypatch, root):
    """What runs on a GPU machine only, as far as it can be known here."""
    for dry in (False, True):
        for part, plan in gpu_run.PARTS.items():
            steps = plan(tmp_path, dry, 16)
            names = [step.name for step in steps]
            assert len(set(names)) == len(names)
            assert all(set(step.after) <= set(names) for step in steps)
            assert all(step.limit_s <= gpu_run.LIMIT_S for step in steps), part
            for step in steps:
                module = step.command[step.command.index("-m") + 1]
                arguments = step.command[step.command.index(module) + 1 :]
                parse = {
                    "benchmarks.gpu_check": gpu_check.parser,
                    "benchmarks.gpu_time": gpu_time.parser,
                    "benchmarks.sweep": sweep.parser,
                }.get(module)
                if parse is not None:
                    parsed = parse().parse_args(arguments)
                    assert module != "benchmarks.sweep" or sweep.check(parsed)
    assert gpu_build.architecture(9, 0) == "90a"
    assert gpu_build.architecture(8, 6) == "86"


def test_every_kernel_is_checked_in_every_dtype_and_direction():
    rows = {(c.op, c.backend, str(c.dtype), c.direction) for c in gpu_check.checks("cuda")}
    for op in OPS:
        for backend in ("cuda", "triton"):
            for dtype in ("torch.float32", "torch.bfloat16", "torch.float16"):
                found = {r[3] for r in rows if r[:3] == (op, backend, dtype)}
                wanted = {"update"} if op.startswith(("ema", "adamw")) else {"forward", "backward"}
                assert found == wanted, (op, backend, dtype)


def test_a_wrong_kernel_and_a_crash_are_rows():
    from jepa_kernels.testing import patched_backend, planted_fault

    check = next(c for c in gpu_check.checks("cpu", ("torch",)) if c.op == "rollout_mlp")
    assert gpu_check.made(check, "cpu")["status"] == "ok"
    with planted_fault("rollout_mlp", "torch", "wrong_sign"):
        assert gpu_check.made(check, "cpu")["status"] == "wrong"
    with patched_backend("rollout_mlp", "torch", forward=lambda inputs: 1 / 0):
        row = gpu_check.made(check, "cpu")
    assert row["status"] == "failed"
    assert "ZeroDivisionError" in row["reason"]


def test_a_lost_device_ends_a_process_and_comes_last_in_the_next(tmp_path, monkeypatch, capsys):
    """After an illegal access every call fails: those rows would accuse sound kernels."""
    found = list(gpu_check.checks("cpu", ("torch",)))[:3]
    calls: list[str] = []

    def fake(check, device):
        calls.append(check.case)
        lost = check is found[1]
        reason = {"reason": "RuntimeError: CUDA error: an illegal memory access"} if lost else {}
        return check.names() | {"status": "failed" if lost else "ok"} | reason

    monkeypatch.setattr(gpu_check, "checks", lambda device, backends: iter(found))
    monkeypatch.setattr(gpu_check, "made", fake)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--output", str(path)]
    assert gpu_check.main(arguments) == 1
    assert gpu_check.main(arguments) == 1
    assert len(calls) == 4
    assert calls[2:] == [found[2].case, found[1].case]


TESTS = """
import pytest
@pytest.mark.parametrize("n", range(7))
def test_n(n):
    assert n != 3
"""


def test_each_process_tests_its_share_and_keeps_a_line_for_each(tmp_path, root):
    (tmp_path / "test_share.py").write_text(TESTS)

    def tested(share: str, code: int) -> list[dict[str, object]]:
        path = tmp_path / f"{share[0]}.jsonl"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--rootdir",
            str(tmp_path),
            "test_share.py",
        ]
        command += ["-p", "benchmarks.gpu_outcomes", f"--outcomes={path}", f"--share={share}"]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, check=False, capture_output=True
        )
        assert done.returncode == code, done.stdout
        return gpu_lines.read(path)

    shares = [tested("0/2", 0), tested("1/2", 1)]
    assert [len(rows) for rows in shares] == [4, 3]
    failed = [row for rows in shares for row in rows if row["outcome"] == "failed"]
    assert [row["test"] for row in failed] == ["test_share.py::test_n[3]"]
    assert "assert 3 != 3" in failed[0]["error"]
    assert len(tested("1/2", 1)) == 4, "only the one that had failed is tested again"
    assert len(tested("0/2", 0)) == 4, "nothing is left to do"


def timed(side: str, ours: bool, ms: float, **names) -> dict[str, object]:
    row = {"op": "masked_attention", "case": "c", "dtype": "bfloat16", "pass": "forward"}
    return {
        **row,
        "size_class": "long",
        "side": side,
        "ours": ours,
        "status": "ok",
        "how": "graph",
        "seconds": {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "min_ms": ms},
        "samples": [ms / 1e3, ms / 1e3],
        "launch_s": 1e-5,
        "peak_bytes": 2**20,
        "flop": 1e12,
        "bytes": None,
        "details": {},
        "machine": {"device_key": "gpu-x", "device_kind": "sm_90", "device": "GPU X"},
        **names,
    }


def test_a_run_becomes_records_preferences_and_a_page(tmp_path):
    out, results = tmp_path / "out", tmp_path / "results"
    with pytest.raises(ValueError, match="must hold the output of a GPU run"):
        gpu_records.write(out, results)
    path = out / "time" / "attention.jsonl"
    for row in (
        timed("cuda", True, 9.0),
        timed("cuda", True, 2.0),  # a resumed run: the later row counts
        timed("triton", True, 1.0),
        timed("sdpa_flash", False, 1.5),
        timed("cuda", True, 6.0, **{"pass": "forward+backward"}),
        timed("varlen", False, 0.0, status="failed", reason="CUDA error: x"),
    ):
        gpu_lines.append(path, row)
    lacking = gpu_records.write(out, results)
    assert [text.split(" (")[0] for text in lacking] == ["checks", "device tests", "sweeps"]
    folder = results / "gpu-x"
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    assert [(r["backend"], r["forward_s"], r["forward_backward_s"]) for r in rows] == [
        ("cuda", 0.002, 0.006),
        ("triton", 0.001, None),
    ]
    chosen = json.loads((folder / "preferences.json").read_text())["rows"]
    assert [(r["slower"], r["faster"]) for r in chosen] == [("cuda", "triton")]
    assert chosen[0]["why"].startswith("takes 2.00 times as long")
    records = json.loads((folder / "masked_attention.json").read_text())["records"]
    ratios = {(r["backend"], r["baseline"]): r["ratio"] for r in records}
    assert ratios == {("cuda", "sdpa_flash"): 0.75, ("triton", "sdpa_flash"): 1.5}
    page = (folder / "gpu.md").read_text()
    assert "GPU X" in page
    assert "500.0" in page, "1e12 FLOP in 2 ms"


def test_the_last_part_of_a_run_is_enough(tmp_path):
    """A sweep, beside the status of the step that made it."""
    folder = tmp_path / "out" / "test"
    folder.mkdir(parents=True)
    machine = {"device_key": "gpu-x", "device_kind": "sm_90", "device": "GPU X"}
    (folder / "sweep_base.json").write_text(json.dumps({"machine": machine}))
    status = {"step": "sweep_base", "status": "ok", "exit": 0, "seconds": 1.0}
    (folder / "sweep_base.status.json").write_text(json.dumps(status))
    lacking = gpu_records.write(tmp_path / "out", tmp_path / "results")
    assert [text.split(" (")[0] for text in lacking] == ["times", "checks", "device tests"]
    written = sorted(path.name for path in (tmp_path / "results" / "gpu-x").iterdir())
    assert written == ["gpu.md", "sweep_base.json"]


def row(backend: str, case: str, forward: float | None, both: float | None = None):
    names = {"op": "o", "device": "d", "dtype": "bfloat16", "size_class": "long", "record": "r"}
    return {
        **names,
        "backend": backend,
        "case": case,
        "forward_s": forward,
        "forward_backward_s": both,
    }


def test_preferences_follow_the_times():
    order = {"o": ("cuda", "triton", "torch")}
    rows = [row("cuda", "a", 1.0, 4.0), row("triton", "a", 2.0, 2.0), row("torch", "a", 9.0, 3.0)]
    assert [(r["slower"], r["faster"], r["why"]) for r in preference_rows.derive(rows, order)] == [
        ("cuda", "triton", "takes 2.00 times as long (r)")
    ]
    # Two cases weigh the same: 1/2 and 2 cancel, whatever their lengths.
    both = [*rows[:2], row("cuda", "b", 9.0), row("triton", "b", 18.0)]
    assert preference_rows.derive(both, order) == []
    # Within the margin nothing changes, and cases that one side lacks do not count.
    assert preference_rows.derive([row("cuda", "a", 1.0), row("triton", "a", 0.98)], order) == []
    assert preference_rows.derive([row("cuda", "a", 1.0), row("triton", "b", 0.1)], order) == []


@pytest.mark.slow
def test_the_dry_run_survives_a_kill(root):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_dry", "check", "--kills", "1", "--seed", "3"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all intact" in done.stdout
