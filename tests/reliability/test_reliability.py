"""A seeded share of the damaged inputs of `python -m tests.reliability`, and that it would see a
fault."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from jepa.data.clip import BadClipError
from tests.reliability import __main__ as command
from tests.reliability import fuzz, readers
from tests.reliability.mutations import mutated


@pytest.mark.timeout(300)
def test_damaged_files_are_read_or_refused():
    findings = fuzz.run(0, 6_000, seed=1)
    assert findings.faults == []
    assert findings.inputs == 6_000
    # Every reader was asked, and both reads and refuses.
    assert set(findings.read) == set(findings.refused) | {"caches"} == set(readers.READERS)


def planted(monkeypatch, read):
    def sound(folder):
        (folder / "a.bin").write_bytes(bytes(100))
        return [folder / "a.bin"]

    monkeypatch.setattr(fuzz, "READERS", {"planted": readers.Reader(sound, read)})
    monkeypatch.setattr(fuzz, "SHARES", {"planted": 1})
    monkeypatch.setattr(fuzz, "LIMIT_S", 1.0)


def sometimes(fault):
    """Reads most inputs and meets its fault in some."""
    return lambda path, number: fault(path) if number < 0.4 else None


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (lambda path: {}[path.name], "KeyError at"),
        (lambda path: os.kill(os.getpid(), signal.SIGSEGV), "died of SIGSEGV"),
        (lambda path: time.sleep(60), "no answer in 1 s"),
        (lambda path: os._exit(3), "ended with status"),
    ],
)
def test_a_fault_is_found_and_the_rest_is_still_read(monkeypatch, fault, what):
    planted(monkeypatch, sometimes(fault))
    findings = fuzz.run(0, 8, seed=5)
    assert 1 <= len(findings.faults) < 8 and findings.inputs == 8
    assert all(what in found["what"] for found in findings.faults)
    # The same inputs alone give the same faults.
    first = findings.faults[0]["input"]
    assert [f["input"] for f in fuzz.run(first, first + 1, seed=5).faults] == [first]


def test_an_empty_refusal_is_a_fault(monkeypatch):
    def silent(path, number):
        raise BadClipError

    planted(monkeypatch, silent)
    assert "no sentence" in fuzz.run(0, 1).faults[0]["what"]


def test_mutations_are_seeded_and_damage():
    import random

    content = bytes(range(256)) * 4
    made = [mutated(content, random.Random(seed), b"other file") for seed in range(300)]
    assert made == [mutated(content, random.Random(seed), b"other file") for seed in range(300)]
    assert sum(one == content for one in made) < 10


def test_the_record_says_how_it_was_made(tmp_path, capsys):
    path = tmp_path / "reliability.json"
    assert command.main(["--inputs", "40", "--kills", "0", "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["command"] == "python -m tests.reliability --inputs 40 --kills 0 --seed 0"
    assert record["readers"]["inputs"] == 40 and record["readers"]["faults"] == []
    assert "40 damaged files, 0 faults" in capsys.readouterr().out


def test_the_committed_record_has_no_fault(root):
    record = json.loads((root / "benchmarks" / "results" / "reliability.json").read_text())
    assert record["readers"]["inputs"] >= 200_000 and record["readers"]["faults"] == []
    assert record["killed"]["kills"] >= 1_000
    assert all(run["different"] == [] for run in record["killed"]["runs"].values())
