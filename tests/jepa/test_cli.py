"""The command line: what it prints, and what it says about wrong words."""

from __future__ import annotations

from jepa import cli
from jepa.variants import VARIANTS


def test_variants_are_listed(capsys):
    assert cli.main(["variants"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    names = [row[1].strip() for row in rows if len(row) > 1]
    assert [name for name in names if name] == list(VARIANTS)
