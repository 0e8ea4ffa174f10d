"""Files that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jepa.atomic import UNFINISHED, replacing, write_json, write_text


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path):
    path = tmp_path / "report.json"
    write_json(path, {"first": 1})
    write_json(path, {"second": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"second": [1, 2.5, None]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    write_text(path, "old\n")
    with replacing(path) as scratch:
        scratch.write_text("half of it")
        assert scratch.name.startswith(UNFINISHED)
        assert path.read_text() == "old\n"
    assert path.read_text() == "half of it"
    write_text(path, "old\n")
    with pytest.raises(RuntimeError, match="interrupted"), replacing(path) as scratch:
        scratch.write_text("half of it")
        raise RuntimeError("interrupted")
    assert path.read_text() == "old\n"
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"value": object()})
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.jsonl"]
