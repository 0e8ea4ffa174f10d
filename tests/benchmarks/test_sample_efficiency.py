"""The sample-efficiency study: its statistics on planted curves, its plan, and a small run from
training to page."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import efficiency_cell, efficiency_page, sample_efficiency
from benchmarks.efficiency_cell import VARIANTS, Asked, Cell, configuration
from benchmarks.efficiency_statistics import (
    clips_to_reach,
    difference,
    gain,
    mean_interval,
    smallest_seen,
    unpacked,
)
from jepa.evaluation import untrained_encoder
from jepa.step import new_state
from jepa.variants import variant


def answers(share, seeds=4, clips=2000, seed=0):
    return (np.random.default_rng(seed).random((seeds, clips)) < share).astype(float)


def test_answers_survive_packing():
    right = np.random.default_rng(0).random(77) < 0.3
    np.testing.assert_array_equal(unpacked(np.packbits(right).tobytes().hex(), 77), right)


def test_a_planted_difference_is_found_and_none_is_not():
    found = difference(answers(0.6, seed=1), answers(0.5, seed=2), comparisons=10)
    assert found.low < 0.1 < found.high and found.low > 0.05
    assert found.strict and found.seeds == 4
    none = difference(answers(0.5, seed=1), answers(0.5, seed=2), comparisons=10)
    assert none.low < 0 < none.high and not none.strict
    interval = mean_interval(answers(0.5))
    assert interval.low < 0.5 < interval.high
    with pytest.raises(ValueError, match="other must have the shape of one"):
        difference(answers(0.5), answers(0.5, clips=10))


def test_pairing_over_clips_and_seeds_narrows_the_interval():
    """Clips that are hard for both sides cancel."""
    hard = np.random.default_rng(3).random((1, 2000)) < 0.5
    one = np.repeat(hard, 4, axis=0).astype(float)
    paired = difference(one, one)
    assert (paired.low, paired.value, paired.high) == (0.0, 0.0, 0.0)


def test_the_gain_is_the_ratio_of_clips_at_an_accuracy_that_both_reach():
    clips = np.array([0.0, 1000.0, 2000.0, 4000.0, 8000.0])
    slow, fast = (
        np.stack([answers(share, seed=i) for i, share in enumerate(shares)])
        for shares in ((0.3, 0.32, 0.36, 0.42, 0.5), (0.3, 0.36, 0.42, 0.5, 0.6))
    )
    found = gain(clips, slow, fast)
    assert found.defined == 1.0
    assert found.ratio.low < 2.0 < found.ratio.high and found.ratio.low > 1.5
    # A baseline that never rises above its start has no level to compare at.
    flat = np.stack([answers(0.3, seed=9)] * 5)
    assert np.isnan(gain(clips, flat, fast).ratio.value)


def test_a_curve_is_read_between_its_points():
    clips, accuracy = np.array([0.0, 99.0, 9999.0]), np.array([0.2, 0.4, 0.6])
    assert clips_to_reach(clips, accuracy, 0.5) == pytest.approx(999.0)
    assert clips_to_reach(clips, accuracy, 0.2) == 0.0
    assert np.isnan(clips_to_reach(clips, accuracy, 0.7))


def test_the_smallest_difference_is_that_of_a_paired_t_test():
    """Simulated: a t-test sees it four times in five."""
    from scipy import stats

    least = smallest_seen(1.0, 5)
    draws = np.random.default_rng(0).normal(least, 1.0, (4000, 5))
    seen = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05).mean()
    assert 0.75 < seen < 0.87
    assert np.isnan(smallest_seen(1.0, 1))


@pytest.mark.parametrize("name", VARIANTS)
def test_cells_of_a_seed_start_alike_and_differ_in_their_objectives(name, tmp_path):
    cfg = configuration(Cell(name, "future", 32, 0, 10, 3), tmp_path)
    base = VARIANTS[name].get("base", name)
    assert cfg.variant.objectives == variant(base).objectives
    assert cfg.variant.masks.context_share == 0.5
    assert cfg.data.size == 10 * cfg.batch_size
    assert bool(cfg.variant.published_behaviour.active()) == (name == "fwm_hw_ld_defect")
    torch.manual_seed(cfg.seed)
    started = new_state(cfg).bundle.context_encoder.state_dict()
    for key, value in untrained_encoder(cfg, 3).state_dict().items():
        assert torch.equal(value, started[key]), key


def small(tmp_path, *more):
    words = "--variants baseline ld --masks future --clips 0 --seeds 0 --steps 4 --labels 160"
    words += " --tests 64 --null 2"
    places = ["--records", str(tmp_path / "r.jsonl"), "--runs", str(tmp_path / "runs")]
    return sample_efficiency.parser().parse_args(
        [*words.split(), "--jobs", "1", "--supervised", "1", *places, *more]
    )


def test_seeds_of_all_variants_come_before_the_next_seed(tmp_path):
    options = small(tmp_path, "--seeds", "0", "1")
    cells = [task.arguments[0] for task in sample_efficiency.tasks(options) if task.kind == "cell"]
    assert [(c.seed, c.variant) for c in cells] == [
        (0, "baseline"),
        (0, "ld"),
        (1, "baseline"),
        (1, "ld"),
    ]


def test_nothing_is_started_that_the_budget_cannot_finish(tmp_path, capsys):
    left_out = sample_efficiency.run(small(tmp_path, "--budget", "0.5"))
    assert len(left_out) == 6 and not (tmp_path / "r.jsonl").exists()
    assert "left out, for want of time (6)" in capsys.readouterr().out


def test_records_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "r.jsonl"
    record = {"kind": "supervised", "side": 32, "top1": {}}
    sample_efficiency.append(path, record)
    with open(path, "a") as file:
        file.write('{"kind": "pix')
    sample_efficiency.append(path, {**record, "side": 64})
    assert [r["side"] for r in sample_efficiency.read_records(path)] == [32, 64]


def test_a_small_study_runs_and_is_drawn(tmp_path):
    asked = Asked(160, 64)
    options = small(tmp_path)
    records = [
        efficiency_cell.run_untrained(32, 0, asked),
        efficiency_cell.run_pixels(32, asked),
        *(
            efficiency_cell.run_cell(Cell(name, "future", 32, clips, 4, 0), asked, options.runs)
            for name, clips in (("baseline", 0), ("ld", 0), ("ld", 64))
        ),
        efficiency_cell.run_supervised(32, asked, 1.0),
    ]
    for record in records:
        sample_efficiency.append(options.records, record)
    point = records[2]["points"][-1]
    assert [p["clips_seen"] / records[2]["batch_size"] for p in records[2]["points"]] == [1, 2, 4]
    for name, share in point["linear"].items():
        assert unpacked(point["hits"][name], 64).mean() == pytest.approx(share)
    # An objective that computes more is charged for it.
    assert records[3]["flop_per_step"] > records[2]["flop_per_step"] > 0
    assert not list(options.runs.iterdir())
    # What is on record is not run again.
    options.null = 1
    todo = {task.key for task in sample_efficiency.tasks(options)}
    assert todo <= {sample_efficiency.key_of(r) for r in records}
    page = efficiency_page.text(options.records)
    assert "| ld | 1 |" in page and "every clip new" in page and "64 unique clips" in page
    assert "say nothing about other seeds" in page
    drawn = efficiency_page.plotted(options.records, tmp_path / "plots")
    names = {path.name for path in drawn}
    assert names >= {"curves_future_32px_new_4.png", "unique_clips_future_32px_4.png"}
