"""The settings of `make test-rounding` cover what they are for, and each gets its turn."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jepa_kernels import native
from tests import rounding


@pytest.mark.parametrize(
    ("variable", "values"),
    [
        ("ATEN_CPU_CAPABILITY", {"default", "avx2", None}),
        ("MKL_ENABLE_INSTRUCTIONS", {"AVX2", None}),
        ("ONEDNN_MAX_CPU_ISA", {"AVX2", "AVX512_CORE", None}),
        ("OMP_NUM_THREADS", {"1", "2"}),
        ("JEPA_KERNELS_ISA", set(native.ISAS)),
    ],
)
def test_the_four_settings_cover_every_kind_of_rounding(variable, values):
    assert {setting.get(variable) for setting in rounding.SETTINGS.values()} == values
    assert len(rounding.SETTINGS) == 4


@pytest.mark.parametrize("setting", ["portable", "avx2"])
def test_a_setting_changes_what_torch_and_the_kernels_use(setting):
    if not rounding.usable(setting):
        pytest.skip(f"this processor has no {setting}")
    variables = rounding.SETTINGS[setting]
    code = (
        "import torch, jepa_kernels; from jepa_kernels import native;"
        "print(torch.backends.cpu.get_cpu_capability(), native.isa_name(), torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    capability = variables["ATEN_CPU_CAPABILITY"].upper()
    assert done.stdout.split() == [
        capability,
        variables["JEPA_KERNELS_ISA"],
        variables["OMP_NUM_THREADS"],
    ]


def test_every_setting_gets_its_turn_and_a_commit_has_one():
    settings = list(rounding.SETTINGS)
    hashes = [f"{number:040x}" for number in range(8)]
    assert [rounding.turn(commit, settings) for commit in hashes] == settings * 2
    assert rounding.turn("ff", ["portable"]) == "portable"


def test_every_part_exists():
    for quick in (False, True):
        for command in rounding.commands(quick):
            for argument in command:
                if argument.startswith("tests/"):
                    assert (rounding.ROOT / argument).exists(), argument


def test_a_red_part_is_reported(monkeypatch, capsys):
    failing = [
        [sys.executable, "-c", "raise SystemExit(3)"],
        [sys.executable, "-c", "print('fine')"],
    ]
    monkeypatch.setattr(rounding, "commands", lambda quick: failing)
    assert rounding.main(["--setting", "portable"]) == 1
    printed = capsys.readouterr().out
    assert "exit 3" in printed
    assert "fine" in printed
    assert "1 settings run, failed: portable" in printed
