"""The sweep end to end on a tiny workload: measures, resumes, leaves out, assembles, predicts; and
its record's arithmetic."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    harness,
    objective_cost,
    optable,
    sweep,
    sweep_measure,
    sweep_plan,
    sweep_record,
    sweep_tables,
    workload,
)
from benchmarks.resolutions import parse_resolution
from jepa.models.sizes import SIZES
from jepa.variants import VARIANTS, variant
from jepa_kernels import BackendUnsupportedError
from jepa_kernels.testing import FLOAT64, MEDIANS

QUICK = [
    "--variants",
    "baseline,ld,kinematic",
    "--resolutions",
    "32,48,64",
    "--frames",
    "8",
    "--rounds",
    "1",
    "--threads",
    "1",
    "--budget",
    "3600",
    "--no-report",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """One sweep, measured once for this file and the report's tests."""
    before = torch.get_num_threads()
    path = tmp_path_factory.mktemp("sweep") / "sweep.json"
    assert sweep.main([*QUICK, "--output", str(path)]) == 0
    torch.set_num_threads(before)
    return path, sweep_record.load(path)


def test_every_cell_is_there(finished: tuple[Path, dict]) -> None:
    _, record = finished
    cells = record["cells"]
    assert len(cells) == 3 * 2 * (
        3 + 3 + 1 + 1
    )  # resolutions x backends x (pretrain + finetune with objective per variant, two of any)
    assert {cell["status"] for cell in cells} == {"ok"}
    for cell in cells:
        assert cell["clips_per_s"] == pytest.approx(1e3 * cell["batch"] / cell["step_ms"])
        assert cell["tokens_per_s"] == pytest.approx(cell["clips_per_s"] * cell["tokens"])
        assert cell["interval_ms"][0] <= cell["step_ms"] * (1 + FLOAT64["rtol"])
        assert cell["flop"] > 0
        assert cell["peak_bytes"] is None or cell["peak_bytes"] > 50 * 2**20
        if cell["backend"] == "auto":
            assert cell["speedup"] > 0 and len(cell["speedup_interval"]) == 2
        if cell["variant"] == "ld":
            assert math.isclose(
                cell["overhead"],
                cell["objective_added_ms"] / (cell["step_ms"] - cell["objective_added_ms"]),
            )


def test_phases_add_up_to_the_step(finished: tuple[Path, dict]) -> None:
    for cell in finished[1]["cells"]:
        total = sum(cell["phases_ms"].values())
        assert total == pytest.approx(cell["step_ms"], rel=MEDIANS["rtol"]), (
            cell
        )  # one round: medians of phases and of the step coincide


def test_fits_have_a_held_out_check(finished: tuple[Path, dict]) -> None:
    fits = finished[1]["fits"]
    assert len(fits) == 2 * 8
    for made in fits:
        assert made["holdout"]["tokens"] == 64
        assert len(made["exponents"]) == len(made["slopes"]) == 3
        assert set(made["phases"]) and made["step"]["points"] == 3


def test_a_finished_sweep_is_kept(
    finished: tuple[Path, dict], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, record = finished
    monkeypatch.setattr(sweep, "measure_resolution", lambda *_: pytest.fail("measured again"))
    assert sweep.main([*QUICK, "--output", str(path)]) == 0
    assert "kept from" in capsys.readouterr().out
    assert sweep_record.load(path)["measured"] == record["measured"]


def test_a_sweep_goes_on_where_it_stopped(
    finished: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption after the second resolution keeps two; the same command measures the third
    only."""
    _, record = finished
    partial = copy.deepcopy(record)
    partial["sizes"] = partial["sizes"][:2]
    for name in ("measured", "objectives"):
        partial[name] = [row for row in partial[name] if row["resolution"] != "64"]
    path = tmp_path / "sweep.json"
    sweep_record.save(path, partial)
    asked: list[str] = []
    real = sweep.measure_resolution

    def counting(record: dict, work: workload.Workload, *rest: object) -> None:
        asked.append(work.resolution.name)
        real(record, work, *rest)

    monkeypatch.setattr(sweep, "measure_resolution", counting)
    assert sweep.main([*QUICK, "--output", str(path)]) == 0
    assert asked == ["64"]
    assert [row["resolution"] for row in sweep_record.load(path)["sizes"]] == ["32", "48", "64"]


def test_what_does_not_fit_the_budget_is_named(finished: tuple[Path, dict], tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    partial = copy.deepcopy(finished[1])
    partial["settings"]["variants"] = ["baseline"]
    arguments = sweep.parser().parse_args(
        ["--variants", "baseline", "--budget", "1", "--output", str(path)]
    )
    plan = sweep_plan.Plan(partial, {"baseline": variant("baseline")}, arguments)
    far = workload.Workload(parse_resolution("512"), SIZES["small"], batch=2)
    assert "of the budget are left" in plan.refusal(far)
    huge = workload.Workload(parse_resolution("512"), SIZES["giant"], batch=4096)
    assert "GB of memory" in plan.refusal(huge)
    assert "left out unless" in plan.describe([far])


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(sweep_plan.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("share", (1.0, 0.8, 0.55))
def test_rounds_are_given_up_before_a_resolution(
    finished: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Where the budget is only a share of what all rounds of every resolution would take, every
    resolution is still measured."""
    now = fake_clock(monkeypatch)
    record = copy.deepcopy(finished[1])
    record["measured"], record["sizes"] = [], []
    arguments = sweep.parser().parse_args(["--backends", "torch,auto", "--budget", "1"])
    plan = sweep_plan.Plan(record, {name: variant(name) for name in arguments.variants}, arguments)
    todo = [
        workload.Workload(parse_resolution(name), SIZES["micro"], batch=2)
        for name in arguments.resolutions
    ]
    plan.deadline = share * sum(plan.seconds(work, arguments.rounds) for work in todo)
    for number, work in enumerate(todo):
        assert plan.refusal(work) is None
        budget = plan.share(todo[number:])
        rounds = max(
            r for r in range(1, arguments.rounds + 1) if r == 1 or plan.seconds(work, r) <= budget
        )
        assert rounds >= (2 if share > 0.6 else 1)
        now[0] += plan.seconds(work, rounds)
        record["sizes"].append({"resolution": work.resolution.name})
    assert now[0] <= plan.deadline


def test_rounds_stop_before_the_one_that_would_pass_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = fake_clock(monkeypatch)

    def run(_: int) -> dict[str, float]:
        now[0] += 1.0
        return {"target": 1.0}

    def rounds(budget_s: float) -> int:
        side = sweep_measure.Side("pretrain", "blocks/ema", "torch", run, {}, 0.0)
        sweep_measure.time_sides([side], 5, budget_s)
        return len(side.rounds)

    # The warm-up takes one second, a round two.
    assert [rounds(budget) for budget in (0.5, 4.9, 5.1, 100.0)] == [1, 1, 2, 5]


def test_failures_become_reasons_and_others_propagate() -> None:
    def boom(error: BaseException) -> sweep_measure.Side:
        def run(_: int) -> dict[str, float]:
            raise error

        return sweep_measure.Side("pretrain", "blocks/ema", "auto", run, {}, 0.0)

    good = sweep_measure.Side(
        "pretrain", "blocks/ema", "torch", lambda _: {"target": 0.001}, {}, 0.0
    )
    memory, refused = (
        boom(MemoryError("no room")),
        boom(BackendUnsupportedError("cannot run on backend 'cuda'")),
    )
    sweep_measure.time_sides([memory, good, refused], 2, 5.0)
    assert memory.problem == ("out of memory", "no room") and refused.problem[0] == "unsupported"
    assert len(good.rounds) == 2 and not memory.rounds
    work = workload.Workload(parse_resolution("32"), SIZES["micro"])
    row = sweep_measure.side_row(memory, work)
    assert row["status"] == "out of memory" and row["reason"] == "no room" and "rounds_s" not in row
    with pytest.raises(RuntimeError, match="a bug"):
        sweep_measure.time_sides([boom(RuntimeError("a bug"))], 1, 1.0)


def test_a_failed_cell_keeps_its_reason_and_the_others_stand(finished: tuple[Path, dict]) -> None:
    record = copy.deepcopy(finished[1])
    for row in record["measured"]:
        if (
            row["kind"] == "pretrain"
            and row["resolution"] == "64"
            and row["backend"] == "auto"
            and row["group"] == "blocks/ema"
        ):
            row |= {"status": "out of memory", "reason": "no room"}
            del row["rounds_s"]
    cells = sweep_record.assemble(record)
    lost = sweep_record.find(
        cells, mode="pretrain", variant="baseline", resolution="64", backend="auto"
    )
    assert (lost["status"], lost["reason"]) == ("out of memory", "no room")
    assert (
        sweep_record.find(
            cells, mode="pretrain", variant="kinematic", resolution="64", backend="auto"
        )["status"]
        == "ok"
    )
    assert (
        sweep_record.find(
            cells, mode="pretrain", variant="baseline", resolution="48", backend="auto"
        )["status"]
        == "ok"
    )
    assert len(sweep_record.fits(cells)) == 16


def test_a_backend_that_cannot_run_here_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "cuda.json"
    small = [
        "--variants",
        "baseline",
        "--resolutions",
        "32",
        "--frames",
        "4",
        "--rounds",
        "1",
        "--modes",
        "pretrain",
        "--data",
        "tensors",
    ]
    assert (
        sweep.main(
            [
                *small,
                "--backends",
                "torch,cuda",
                "--device",
                "cpu",
                "--no-report",
                "--output",
                str(path),
            ]
        )
        == 0
    )
    cells = {cell["backend"]: cell for cell in sweep_record.load(path)["cells"]}
    assert cells["torch"]["status"] == "ok"
    assert cells["cuda"]["status"] == "unsupported" and "cuda" in cells["cuda"]["reason"]


def test_op_table_takes_turns_and_keeps_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def comparisons(name: str, count: int) -> list[harness.Comparison]:
        def call() -> None:
            if name == "refuses":
                raise BackendUnsupportedError("no such device")

        return [
            harness.Comparison(
                f"{name}{i}", "float32", "forward", "cpu", "other", call, call, lambda: None
            )
            for i in range(count)
        ]

    monkeypatch.setattr(optable, "bench_names", lambda: ["long", "refuses"])
    monkeypatch.setattr(
        optable,
        "comparisons_of",
        lambda op: lambda _: iter(comparisons(op, 3 if op == "long" else 1)),
    )
    rows, unfinished = optable.run(20.0)
    assert [row["op"] for row in rows] == ["long", "refuses", "long", "long"] and unfinished == []
    assert rows[1]["status"] == "unsupported" and rows[1]["reason"] == "no such device"
    assert "unsupported" in optable.text(rows)
    assert optable.run(-1.0)[1] == ["long", "refuses"]


def test_groups_and_signatures_share_work() -> None:
    groups = {name: workload.Group.of(variant(name), "none").name for name in VARIANTS}
    assert groups["baseline"] == groups["ld"] == "blocks/ema"
    assert groups["kinematic"] == groups["sigreg_no_ema"] == "blocks/online"
    assert groups["amg"] == groups["combo"]
    alone = ("baseline", "kinematic", "amg", "motion_guided", "future_predictive", "motion_future")
    assert len({groups[name] for name in alone}) == len(alone)
    same = [objective_cost.signature(variant(name)) for name in ("kinematic", "kinematic_0_1")]
    assert same[0] == same[1] != objective_cost.signature(variant("kinematic_huber"))
    assert objective_cost.is_baseline(variant("motion_guided")) and not objective_cost.is_baseline(
        variant("hw")
    )


def test_prediction_of_an_unmeasured_size(
    finished: tuple[Path, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    path, record = finished
    assert sweep.main(["--predict", "512x512x32", "--batch", "8", "--record", str(path)]) == 0
    text = capsys.readouterr().out
    assert "16384 tokens per clip" in text and "held-out check" in text
    made = sweep_record.find(record["fits"], mode="pretrain", variant="baseline", backend="auto")
    line = next(
        line for line in text.splitlines() if line.startswith("pretrain") and "baseline" in line
    )
    expected = (
        made["step"]["constant"]
        + made["step"]["per_token"] * 8 * 16384
        + made["step"]["per_pair"] * 8 * 16384**2
    )
    assert f"{expected:.3f} s" in line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--variants", "nosuch"], "variants must be of"),
        (["--backends", "gpu"], "backends must be of"),
        (["--modes", "probe"], "modes must be of"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--resolutions", "100"], "multiple of 16"),
        (["--predict", "512"], "HEIGHTxWIDTHxFRAMES"),
        (["--predict", "64x64x8", "--record", "/nonexistent.json"], "does not exist"),
    ],
)
def test_bad_questions_get_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_plan_alone_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.json"
    assert sweep.main(["--plan", "--output", str(path)]) == 0
    groups = {workload.Group.of(variant(name), "none") for name in VARIANTS}
    assert f"{len(VARIANTS)} variants in {len(groups)} groups" in capsys.readouterr().out
    assert not path.exists()


def test_own_encoder_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    own = [
        "--variants",
        "baseline",
        "--resolutions",
        "32",
        "--frames",
        "4",
        "--rounds",
        "1",
        "--modes",
        "pretrain",
        "--backends",
        "torch",
    ]
    given = [
        *own,
        "--data",
        "tensors",
        "--encoder",
        "jepa.models.encoder:Encoder",
        "--no-report",
        "--output",
        str(path),
    ]
    assert sweep.main(given) == 0
    cell = sweep_record.load(path)["cells"][0]
    assert cell["status"] == "ok" and "speedup" not in cell
    with pytest.raises(ValueError, match=r"package\.module:factory"):
        workload.load_encoder("nonsense", SIZES["micro"])
    with pytest.raises(ValueError, match="UCF-101 folder"):
        workload.clip_source(
            workload.Workload(parse_resolution("32"), SIZES["micro"], data="/nonexistent")
        )


def test_real_video_from_a_ucf101_folder(shared_dir: Path, tmp_path: Path) -> None:
    folder = shared_dir / "clips" / "ucf101"
    work = workload.Workload(parse_resolution("48x64"), SIZES["micro"], frames=8, data=str(folder))
    group = workload.Group.of(variant("motion_guided"), "none")
    batch = workload.make_batch(work, group.policy, workload.clip_source(work), 0)
    assert batch.clips.shape == (2, 8, 48, 64, 3) and batch.clips.float().std() > 10
    assert batch.masks.grid == (4, 3, 4)
    with pytest.raises(ValueError, match=r"\.avi files"):
        workload.clip_source(
            workload.Workload(parse_resolution("32"), SIZES["micro"], data=str(tmp_path))
        )


def test_objective_cost_sees_work_that_is_there() -> None:
    """SIGReg does hundreds of times the arithmetic of a delta, and the paired difference must show
    it."""
    work = workload.Workload(parse_resolution("64"), SIZES["micro"], frames=8)
    group = workload.Group.of(variant("baseline"), "none")
    pretraining = workload.Pretraining(work)
    loaded = workload.make_batch(work, group.policy, workload.TensorClips(work), 0)
    batch = loaded.for_step(workload.normalised(work, loaded), workload.STEP)
    features = pretraining.features(group, batch)
    costs = {
        name: objective_cost.measure(
            pretraining,
            group,
            variant(name),
            batch,
            features,
            backend="torch",
            rounds=3,
            budget_s=2.0,
        )
        for name in ("delta", "sigreg")
    }
    assert costs["sigreg"].added_s > 2 * max(0.0, costs["delta"].added_s)
    assert costs["sigreg"].interval_s[0] <= costs["sigreg"].added_s <= costs["sigreg"].interval_s[1]


def test_records_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"schema": 1, "records": []}))
    with pytest.raises(ValueError, match="must be a sweep"):
        sweep_record.load(path)


def test_tables_of_an_empty_record_say_why() -> None:
    record = {
        "sizes": [],
        "left_out": [{"resolution": "64", "reason": "no time"}],
        "settings": SimpleNamespace(),
    }
    assert "64 px: no time" in sweep_tables.summary(record)
