"""Variants, published behaviour and strict configuration."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa import objectives
from jepa.config import ConfigError, from_dict, load, merged, parse_overrides, to_dict, to_yaml
from jepa.objectives import WeightSchedule, weights
from jepa.objectives.context import published_factor
from jepa.published_behaviour import PublishedBehaviour, parse_published_behaviour
from jepa.step import StepConfig
from jepa.variants import VARIANTS, VariantConfig, parse_masks, parse_variant, variant

# Name -> (mask policy, what it adds to the baseline with its weight, target): the published study's
# table, typed in again. Variants of our own are not in it.
PUBLISHED = {
    "baseline": ("blocks", {}, "ema"),
    "motion_guided": ("motion 2 .1", {}, "ema"),
    "amg": ("motion 5 0", {}, "ema"),
    "future_predictive": ("future", {}, "ema"),
    "motion_future": ("future motion 2 .1", {}, "ema"),
    "hw": ("blocks", {"hard_region": 0.3}, "ema"),
    "delta": ("blocks", {"delta": 0.5}, "ema"),
    "combo": ("motion 5 0", {"delta": 0.5, "hard_region": 0.3}, "ema"),
    "fwm": ("blocks", {"static": 0.05, "orthogonality": 0.01}, "ema"),
    "ld": ("blocks", {"latent_dynamics": 1}, "ema"),
    "fwm_ld": ("blocks", {"static": 0.05, "orthogonality": 0.01, "latent_dynamics": 1}, "ema"),
    "hw_ld": ("blocks", {"hard_region": 1, "latent_dynamics": 1}, "ema"),
    "fwm_hw_ld": (
        "blocks",
        {"static": 0.05, "orthogonality": 0.01, "hard_region": 1, "latent_dynamics": 1},
        "ema",
    ),
    "spectral": ("blocks", {"spectral": 1}, "ema"),
    "ltc": ("blocks", {"ltc": 0.5}, "ema"),
    "ac": ("blocks", {"action": 1}, "ema"),
    "ac_hw": ("blocks", {"action": 1, "hard_region": 0.3}, "ema"),
    "fac": ("blocks", {"static": 0.05, "orthogonality": 0.01, "action": 1}, "ema"),
    "kinematic": ("blocks", {"kinematic": 1}, "online"),
    "kinematic_0_1": ("blocks", {"kinematic": 0.1}, "online"),
    "kinematic_huber": ("blocks", {"kinematic": 0.1}, "online"),
    "kinematic_accel": ("blocks", {"kinematic": 0.1}, "online"),
    "kinematic_split": ("blocks", {"kinematic": 0.1}, "online"),
    "kinematic_anneal": ("blocks", {"kinematic": 0.1}, "online"),
    "velgate": ("blocks", {"velgate": 1}, "ema"),
    "hamiltonian": ("blocks", {"hamiltonian": 1}, "ema"),
    "sigreg": ("blocks", {"sigreg": 1}, "ema"),
    "sigreg_no_ema": ("blocks", {"sigreg": 1}, "online"),
}


def described(policy) -> str:
    words = ["future"] if policy.context_share < 1 else []
    if policy.motion is not None:
        words += [
            "motion",
            f"{policy.motion.strength:g}",
            f"{policy.motion.random_rate:g}".lstrip("0") or "0",
        ]
    return " ".join(words) or "blocks"


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants_are_those_of_the_study(name):
    cfg = variant(name)
    masks, added, target = PUBLISHED[name]
    assert described(cfg.masks) == masks
    assert {key: value.weight for key, value in cfg.objectives.items()} == {
        "prediction": 1.0,
        "context": 0.5,
        **added,
    }
    assert cfg.target.kind == target
    assert cfg.published_behaviour == PublishedBehaviour()
    assert [one.num_blocks for one in cfg.masks.sets] == ([4, 1] if "future" in masks else [8, 2])


def test_details_of_the_published_variants_match():
    assert variant("fwm_ld").objectives["latent_dynamics"].channels == "dynamics"
    assert variant("ld").objectives["latent_dynamics"].channels == "all"
    assert variant("fac").objectives["action"].channels == "dynamics"
    assert variant("fwm_hw_ld").objectives["latent_dynamics"].hard_region
    assert not variant("fwm_ld").objectives["latent_dynamics"].hard_region
    assert variant("kinematic_huber").objectives["kinematic"].kind == "huber"
    assert variant("kinematic_split").objectives["kinematic"].channel_share == 0.5
    assert variant("kinematic_anneal").objectives["kinematic"].schedule.factor(
        0.5
    ) == pytest.approx(0.5)


def test_a_new_combination_needs_no_code():
    cfg = parse_variant(
        {
            "base": "fwm",
            "objectives": {
                "sigreg": {"weight": 0.2, "slices": 64},
                "latent_dynamics": {"horizon": 3},
            },
            "masks": {"name": "motion", "strength": 3, "context_share": 0.5},
            "factorisation": {"split": "channels"},
            "published_behaviour": ["motion_point_sampling"],
        },
        "variant",
    )
    assert set(cfg.objectives) == {
        "prediction",
        "context",
        "static",
        "orthogonality",
        "sigreg",
        "latent_dynamics",
    }
    assert cfg.pair_horizon == 3
    assert cfg.mask_policy.motion.strength == 3
    assert cfg.mask_policy.motion.sampling == "point"
    assert cfg.mask_policy.motion.maximum == "sample"
    assert cfg.mask_policy.context_share == 0.5
    assert from_dict(VariantConfig, to_dict(cfg)) == cfg


@pytest.mark.parametrize("name", VARIANTS)
def test_configurations_survive_yaml(name, tmp_path):
    path = tmp_path / "variant.yaml"
    path.write_text(to_yaml(variant(name, published_behaviour="all")))
    assert load(VariantConfig, path) == variant(name, published_behaviour="all")


@pytest.mark.parametrize("name", PublishedBehaviour.names())
def test_published_behaviour_switches_one_by_one(name):
    cfg = variant("amg", published_behaviour=[name])
    assert cfg.published_behaviour.active() == (name,)
    policy, fixed = cfg.mask_policy, variant("amg").mask_policy
    assert (policy.motion.sampling == "point") == (name == "motion_point_sampling")
    assert (policy.motion.maximum == "published") == (name == "motion_maximum_of_wrong_sample")
    assert (policy.truncate == "batch_min") == (name == "truncate_to_batch_minimum")
    assert policy.shared_block_size == (name == "shared_block_size")
    assert fixed.truncate == "none"


def test_published_behaviour_all_together_and_by_wrong_name():
    assert PublishedBehaviour.of(["all"]).active() == PublishedBehaviour.names()
    assert parse_published_behaviour("all", "published_behaviour") == PublishedBehaviour.published()
    assert {defect for defect, _ in PublishedBehaviour.describe().values()} >= {
        "D1",
        "D2",
        "D3",
        "D4",
        "D6",
        "D7",
        "D10",
        "D11",
    }
    sentence = "unknown published behaviour 'shared_mask_tokn'; did you mean 'shared_mask_token'"
    with pytest.raises(ConfigError, match=sentence):
        PublishedBehaviour.of(["shared_mask_tokn"])


def test_context_ramp_is_a_share_of_training_unless_published():
    objectives_of = variant("baseline").objectives
    none = PublishedBehaviour()
    for step, expected in ((0, 0.0), (499, 0.0), (750, 0.25), (1000, 0.5)):
        weight = weights(objectives_of, step, step / 1000, none)["context"]
        assert weight == pytest.approx(expected)
    fixed = PublishedBehaviour(context_ramp_fixed_steps=True)
    for step, expected in ((1000, 0.0), (15_000, 0.0), (22_500, 0.25), (30_000, 0.5), (10**6, 0.5)):
        assert weights(objectives_of, step, 1.0, fixed)["context"] == pytest.approx(expected)
    assert published_factor(22_500) == 0.5


def test_weight_schedules():
    assert [WeightSchedule().factor(p) for p in (0, 1)] == [1, 1]
    assert [
        WeightSchedule("ramp", 0.2, 0.6).factor(p) for p in (0, 0.2, 0.4, 0.6, 1)
    ] == pytest.approx([0, 0, 0.5, 1, 1])
    assert [WeightSchedule("cosine").factor(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": {}}, "unknown key 'objective'; did you mean 'objectives'"),
        ({"objectives": {"sigregg": {}}}, "unknown objective 'sigregg'; did you mean 'sigreg'"),
        (
            {"objectives": {"delta": {"weight": "big"}}},
            "objectives.delta.weight must be float, got 'big'",
        ),
        (
            {"objectives": {"action": {"channels": "some"}}},
            "objectives.action.channels must be one of 'all', 'dynamics', got 'some'",
        ),
        ({"masks": "moton"}, "unknown mask policy 'moton'; did you mean 'motion'"),
        ({"masks": {"name": "motion", "strenght": 2}}, "unknown key 'masks.strenght'"),
        ({"target": {"kind": "emma"}}, "target.kind must be one of 'ema', 'online', got 'emma'"),
        ({"target": {"detach": 1}}, "target.detach must be bool, got 1"),
        ({"quirks": ["all"]}, "unknown key 'quirks'; it is now called 'published_behaviour'"),
        ({"published_behaviour": ["nope"]}, "unknown published behaviour 'nope'"),
    ],
)
def test_wrong_configurations_name_the_key(change, message):
    with pytest.raises(ConfigError, match=message):
        variant("baseline", **change) if "masks" not in change else parse_variant(
            {"base": "baseline", **change}, ""
        )


def test_a_named_variant_is_one_entry(tmp_path):
    """The command, the sweep and the tests follow the table: one more entry turns nothing red, and
    the tests of every variant have one case more."""
    (tmp_path / "with_one_more.py").write_text(
        "from jepa.variants import VARIANTS\n"
        "VARIANTS['slow_delta'] = {'objectives': {'delta': {'weight': 0.125}}}\n"
    )
    tests = (
        "tests/jepa/test_variants.py",
        "tests/jepa/test_step.py::test_every_variant_trains[slow_delta-False]",
        "tests/jepa/test_step.py::test_nothing_is_read_back_and_nothing_loops[slow_delta]",
        "tests/benchmarks/test_sweep.py::test_plan_alone_measures_nothing",
        "tests/jepa/test_cli.py::test_variants_are_listed",
    )
    words = ["-p", "with_one_more", "-p", "no:cacheprovider", "-k", "not one_entry", "-q", *tests]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_unknown_variant_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown variant 'fwm_hw_l'; did you mean 'fwm_hw_ld'"):
        variant("fwm_hw_l")


def test_overrides_and_files_lie_over_each_other(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "variant: fwm_ld\nmodel: {size: micro, width: 48}\nschedule: {total_steps: 500}\n"
    )
    cfg = load(
        StepConfig,
        path,
        ["schedule.rate=1e-3", "model.predictor.depth=2", "precision=bf16", "clip_gradient=1"],
    )
    assert cfg.schedule.rate == 1e-3
    assert cfg.schedule.total_steps == 500
    assert cfg.model.width == 48
    assert cfg.model.predictor.depth == 2
    assert cfg.precision == "bf16"
    assert cfg.clip_gradient == 1.0
    assert cfg.variant == variant("fwm_ld")
    assert parse_overrides(["a.b=1", "a.c=[1, 2]", "d=x"]) == {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}
    with pytest.raises(ConfigError, match=r"override must look like a.b.c=value, got 'rate'"):
        parse_overrides(["rate"])
    with pytest.raises(ConfigError, match=r"unknown key 'schedule.rat'; did you mean 'rate'"):
        load(StepConfig, path, ["schedule.rat=1"])


def test_resolved_configuration_is_complete():
    data = to_dict(StepConfig())
    assert from_dict(StepConfig, data) == StepConfig()
    assert set(data["variant"]["objectives"]) == {"prediction", "context"}
    assert dataclasses.is_dataclass(StepConfig)


def test_mask_policies_by_name_mapping_and_value():
    assert parse_masks("future", "masks").context_share == 0.5
    policy = parse_masks({"name": "motion_future", "random_rate": 0.5}, "masks")
    assert policy.motion.random_rate == 0.5
    assert parse_masks(policy, "masks") is policy
    assert parse_masks(to_dict(policy), "masks") == policy


def test_every_objective_file_is_listed():
    assert {"prediction", "context", "sigreg"} <= set(objectives.names())
    assert "base" not in objectives.names()
