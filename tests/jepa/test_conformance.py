"""Conformance: the published numbers agree, and the check itself misses nothing: wrong numbers,
unread arrays, unknown files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jepa.conformance import Golden, Report, check_file, check_folder
from jepa.conformance.__main__ import main
from jepa.conformance.report import Row
from tests.jepa.planted import faults_of

PUBLISHED = Path(__file__).resolve().parents[1] / "golden" / "published"


def explained(report: Report) -> str:
    return "\n".join(
        f"{row.file} {row.array}: {row.error:.2e} > {row.tolerance:.1e} {row.note}"
        for row in report.failures[:20]
    )


@pytest.fixture
def two_seeds(monkeypatch):
    """Two instead of eight, to save time: a miss is run with all of them."""
    monkeypatch.setattr("jepa.conformance.sensitivity.SEEDS", 2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_published_copy_agrees(backend):
    report = check_folder(PUBLISHED, backend)
    assert not report.failures, explained(report)
    assert len(report.by_file()) == 10
    assert len(report.rows) > 2500


@pytest.mark.slow
def test_every_golden_file_agrees(shared_dir):
    """With the reference backend; `make conformance`, a part of `make test`, asks the same of the
    backends that `auto` picks."""
    report = check_folder(shared_dir / "golden", "reference")
    assert not report.failures, explained(report)
    assert len(report.by_file()) == 85
    assert len(report.rows) > 60_000
    # Rounding decides a handful of arrays of a step, nothing of a module or of an objective.
    assert {row.file.split("/")[0] for row in report.measured} <= {"steps"}


@pytest.mark.parametrize(
    "path", sorted(PUBLISHED.glob("*/*.npz")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_planted_faults_are_seen(path):
    for name in faults_of(path):
        assert planted_failures(path, name), name


@pytest.mark.slow
@pytest.mark.parametrize(("part", "files"), [("modules", 28), ("objectives", 28), ("steps", 29)])
def test_planted_faults_are_seen_in_every_golden_file(part, files, shared_dir, two_seeds):
    paths = sorted(shared_dir.glob(f"golden/{part}/*.npz"))
    assert len(paths) == files
    unseen = [
        (path.stem, name)
        for path in paths
        for name in faults_of(path)
        if not planted_failures(path, name)
    ]
    assert not unseen


def planted_failures(path: Path, fault: str) -> list[Row]:
    """What a file finds wrong with a fault in the code; not that the code can no longer run."""
    report = Report()
    with pytest.MonkeyPatch.context() as patch:
        faults_of(path)[fault](patch)
        check_file(path, report)
    assert all(row.array != "(file)" for row in report.failures), explained(report)
    return report.failures


def test_the_command_prints_a_table_and_returns_zero(tmp_path):
    for part in ("modules", "objectives"):
        (tmp_path / part).mkdir()
    shutil.copy(PUBLISHED / "modules" / "ema.npz", tmp_path / "modules")
    shutil.copy(PUBLISHED / "objectives" / "baseline.npz", tmp_path / "objectives")
    command = [sys.executable, "-m", "jepa.conformance", str(tmp_path), "--backend", "reference"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "published behaviour switched on: dynamics_hard_no_gradient" in done.stdout
    assert "modules/ema" in done.stdout
    assert "2 files, 68 arrays compared, 0 misses" in done.stdout


def changed(source: Path, folder: Path, **arrays) -> Path:
    """A copy of a golden file with arrays added or replaced."""
    (folder / source.parent.name).mkdir(exist_ok=True)
    with np.load(source) as archive:
        data = {key: archive[key] for key in archive.files}
    path = folder / source.parent.name / source.name
    np.savez(
        path,
        **{
            **data,
            **{key: value(data) if callable(value) else value for key, value in arrays.items()},
        },
    )
    return path


def shifted(key: str, amount: float = 1e-3):
    return lambda data: data[key] * (1 + amount)


@pytest.mark.parametrize(
    ("part", "name", "key"),
    [
        ("objectives", "fwm_hw_ld", "term_fwm_orth_loss"),
        ("objectives", "fwm_hw_ld", "loss"),
        ("objectives", "fwm_hw_ld", "grad_z_enc_1"),
        ("objectives", "fwm_hw_ld", "aux_grad_z_pred_0"),
        ("objectives", "kinematic_accel", "cfg_kinematic_coeff"),
        ("objectives", "kinematic_accel", "grad_h_raw"),
        ("modules", "ema", "ramp_target3_c"),
        ("modules", "adamw", "decay_p3_encoder.tok"),
        ("modules", "adamw", "config_lr"),
        ("modules", "mask_distance", "g14_dist_0"),
    ],
)
def test_a_wrong_number_is_a_miss(tmp_path, part, name, key):
    report = Report()
    check_file(changed(PUBLISHED / part / f"{name}.npz", tmp_path, **{key: shifted(key)}), report)
    assert key in {row.array for row in report.failures}


@pytest.mark.parametrize("key", ["step1_term_loss_pred", "step2_loss", "grad_z_pred_1", "h"])
def test_a_wrong_number_of_a_step_is_a_miss(tmp_path, key, two_seeds):
    path = changed(PUBLISHED / "steps" / "baseline.npz", tmp_path, **{key: shifted(key)})
    shutil.copy(PUBLISHED / "steps" / "init_state.npz", path.parent)
    report = Report()
    check_file(path, report)
    failures = [row.array for row in report.failures]
    assert failures[0] == key
    # What is below a gradient is computed from the file's.
    assert key.startswith("grad_") or len(failures) == 1


def test_a_wrong_weight_after_a_step_is_a_miss(tmp_path, two_seeds):
    def moved(data):
        sums = data["param_sum_after_step2"].copy()
        sums[3] += 1e-2
        return sums

    path = changed(PUBLISHED / "steps" / "baseline.npz", tmp_path, param_sum_after_step2=moved)
    shutil.copy(PUBLISHED / "steps" / "init_state.npz", path.parent)
    report = Report()
    check_file(path, report)
    assert len(report.failures) == 1
    assert report.failures[0].array.startswith("param_sum_after_step2[")


def test_flags_are_compared(tmp_path):
    report = Report()
    changes = {"grad_is_none_z_enc_0": np.array(False), "term_has_grad_loss_pred": np.array(False)}
    check_file(changed(PUBLISHED / "objectives" / "baseline.npz", tmp_path, **changes), report)
    assert {row.array for row in report.failures} == set(changes)


def test_an_unknown_key_and_an_unknown_file_are_misses(tmp_path):
    changed(PUBLISHED / "objectives" / "baseline.npz", tmp_path, surprise=np.zeros(2))
    shutil.copy(
        PUBLISHED / "objectives" / "kinematic_accel.npz",
        tmp_path / "objectives" / "no_such_variant.npz",
    )
    (tmp_path / "objectives" / "notes.txt").write_text("not a golden file")
    (tmp_path / "extra").mkdir()
    report = check_folder(tmp_path)
    notes = {(row.file, row.array): row.note for row in report.failures}
    assert notes["objectives/baseline", "surprise"] == "not read: unknown key"
    assert "no variant is named 'no_such_variant'" in notes["objectives/no_such_variant", "(file)"]
    assert ("objectives/notes", "(file)") in notes
    assert ("extra", "(file)") in notes
    assert main([str(tmp_path)]) == 1


def test_a_missing_key_is_a_miss(tmp_path):
    (tmp_path / "objectives").mkdir()
    with np.load(PUBLISHED / "objectives" / "baseline.npz") as archive:
        data = {key: archive[key] for key in archive.files if key != "h_raw"}
    path = tmp_path / "objectives" / "baseline.npz"
    np.savez(path, **data)
    report = Report()
    check_file(path, report)
    assert any("h_raw" in row.note for row in report.failures)


def test_a_damaged_file_is_a_miss(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "ema.npz").write_bytes(
        (PUBLISHED / "modules" / "ema.npz").read_bytes()[:4000]
    )
    report = check_folder(tmp_path)
    assert [row.array for row in report.failures] == ["(file)"]


def test_an_unusable_backend_is_a_miss_not_a_detour(tmp_path):
    (tmp_path / "modules").mkdir()
    for name in ("rope_hd32_weights", "rope_hd32_rect_masked_interp1"):
        shutil.copy(PUBLISHED / "modules" / f"{name}.npz", tmp_path / "modules")
    report = check_folder(tmp_path, "cuda")
    assert any(
        "masked_attention cannot run on backend 'cuda'" in row.note for row in report.failures
    )


def test_nothing_to_check_is_an_error(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"must hold objectives, modules, steps with .npz files, got none"
    ):
        check_folder(tmp_path)
    assert main([str(tmp_path)]) == 2


def test_a_planted_fault_in_the_code_is_seen(monkeypatch):
    """The teacher's features standardised with the wrong epsilon: too small to see, and seen."""
    monkeypatch.setattr("jepa.target.STANDARDISE_EPS", 1e-3)
    report = Report()
    check_file(PUBLISHED / "objectives" / "baseline.npz", report)
    assert {"h", "loss"} <= {row.array for row in report.failures}


@pytest.mark.parametrize(
    ("attribute", "factor"),
    [("learning_rate", 1.002), ("ema_momentum", 0.999)],
)
def test_a_planted_fault_in_the_update_is_seen(monkeypatch, attribute, factor, two_seeds):
    """What rounding decides in AdamW must not cover for a wrong rate or momentum."""
    from jepa.schedules import ScheduleConfig

    original = getattr(ScheduleConfig, attribute)
    monkeypatch.setattr(ScheduleConfig, attribute, lambda self, step: original(self, step) * factor)
    report = Report()
    check_file(PUBLISHED / "steps" / "baseline.npz", report)
    assert len(report.failures) > 50
    assert all(row.array.startswith(("param_", "step2_")) for row in report.failures)


def test_errors_are_relative_and_absolute_where_there_is_nothing():
    report, wanted = Report(), np.array([3.0, 4.0])
    report.compare("one percent", wanted * 1.01, wanted)
    report.compare("shape", wanted[:1], wanted)
    report.compare("not a number", np.array([np.nan, 4.0]), wanted)
    report.compare("nothing", np.array([5e-8]), np.array([0.0]))
    report.compare("something", np.array([2e-7]), np.array([0.0]))
    assert report.rows[0].error == pytest.approx(0.01)
    assert [row.passed for row in report.rows] == [False, False, False, True, False]
    assert report.rows[1].error == report.rows[2].error == np.inf


def test_golden_files_know_what_was_read():
    golden = Golden(PUBLISHED / "modules" / "mask_distance.npz")
    unread = set(golden.unread())
    assert unread == set(golden.names())
    golden.tensor("g4_dist_0")
    assert unread - set(golden.unread()) == {"g4_dist_0"}
