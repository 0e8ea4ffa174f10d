"""The comparison of waiting policies: every workload is timed, rows say which way the ratio is, and
busy rows say so."""

from __future__ import annotations

import json

import pytest

from benchmarks import waiting


def samples(busy=False):
    """Passive twice as slow as active, and a machine that is a tenth slower in the second half."""
    for number, policy in enumerate(waiting.ORDER):
        seconds = (2e-3 if policy == "passive" else 1e-3) * (1.1 if number >= 2 else 1.0)
        yield policy, {name: {"seconds": seconds, "busy": busy} for name in waiting.WORK}


def test_rows_compare_passive_with_active():
    rows = waiting.compared(list(samples()))
    assert [row["case"] for row in rows] == list(waiting.WORK)
    for row in rows:
        assert row["ratio"] == pytest.approx(2.0)
        assert row["ratio_range"] == pytest.approx([2.0 / 1.1, 2.2])
    said = waiting.text(rows)
    assert "2.00 [1.82, 2.20]" in said and "busy" not in said


def test_a_busy_machine_is_named():
    assert "other programs had the cores" in waiting.text(waiting.compared(list(samples(True))))


def test_policies_take_turns_and_become_a_record(monkeypatch, tmp_path, capsys):
    asked = []

    def child(policy, seconds):
        asked.append(policy)
        return dict(list(samples())[len(asked) - 1][1])

    monkeypatch.setattr(waiting, "child", child)
    path = tmp_path / "waiting.json"
    assert waiting.main(["--output", str(path)]) == 0
    assert asked == ["passive", "active", "active", "passive"]
    records = json.loads(path.read_text())["records"]
    assert len(records) == len(waiting.WORK)
    assert {"ratio", "busy", "threads", "git_commit", "load_average"} <= records[0].keys()
    assert "record:" in capsys.readouterr().out


@pytest.mark.slow
def test_a_child_times_every_workload():
    found = waiting.child("passive", 0.1)
    assert found.keys() == waiting.WORK.keys()
    assert all(0 < row["seconds"] < 10 for row in found.values())
