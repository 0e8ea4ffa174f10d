"""Probes, fine-tuning and encode on a tiny run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest

from jepa import cli, encode, finetune, pretrain
from jepa.checkpoint import Checkpoints
from jepa.config import ConfigError
from jepa.data.build import DataConfig, build_dataset
from jepa.data.moving_shapes import FACTORS
from jepa.evaluation import (
    InputSpec,
    cached_features,
    checkpoint_folder,
    load_bundle,
    untrained_encoder,
    wilson,
)
from jepa.finetune import FinetuneConfig, layer_groups
from jepa.models.probes import Probe
from jepa.probe import Features, ProbeConfig, has_converged, probed, train_probe
from jepa_kernels.testing import FLOAT16_STORED, FLOAT32_STORED
from tests.jepa.run_cases import tiny_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    pretrain.run(tiny_run(folder, steps=2, name="fwm_hw_ld"))
    return folder


@pytest.mark.parametrize("correct, count", [(0, 10), (7, 10), (10, 10), (30, 49)])
def test_the_interval_is_wilsons(correct, count):
    expected = binomtest(correct, count).proportion_ci(method="wilson")
    assert wilson(correct, count) == pytest.approx(
        (expected.low, expected.high), abs=FLOAT32_STORED["atol"]
    )


def test_the_evaluated_encoder_is_the_teacher(tiny):
    bundle, _, digest = load_bundle(tiny)
    tensors, _, state = Checkpoints(tiny / "checkpoints").load()
    assert digest == state["sha256"]["model"]
    assert torch.equal(
        bundle.evaluation_encoder.blocks[0].attn.qkv.weight,
        tensors["target_encoder.blocks.0.attn.qkv.weight"],
    )
    assert not torch.equal(
        bundle.evaluation_encoder.blocks[0].attn.qkv.weight,
        tensors["context_encoder.blocks.0.attn.qkv.weight"],
    )


def test_a_checkpoint_is_found_or_refused_by_name(tiny, tmp_path):
    assert checkpoint_folder(tiny).name == "step_00000002"
    assert checkpoint_folder(tiny, 1).name == "step_00000001"
    assert checkpoint_folder(tiny, "best").name in ("step_00000001", "step_00000002")
    with pytest.raises(ConfigError, match=r"must be newest, best or one of \[1, 2\], got 7"):
        checkpoint_folder(tiny, 7)
    with pytest.raises(ConfigError, match="jepa pretrain` makes one"):
        checkpoint_folder(tmp_path)


def test_features_are_computed_once_and_appear_whole(tiny, tmp_path, monkeypatch):
    _, cfg, _ = load_bundle(tiny)
    dataset = build_dataset(replace(cfg.data, size=5))
    spec = InputSpec.of(cfg, "moving_shapes")
    encoder, path = untrained_encoder(cfg), tmp_path / "cache" / "a.npy"
    found = cached_features(encoder, dataset, spec, path, batch_size=2)
    assert found.shape == (5, 2 * 4 * 4, cfg.model.width) and found.dtype == np.float16
    alone = cached_features(encoder, dataset, spec, tmp_path / "b.npy", batch_size=5)
    assert np.allclose(found, alone, **FLOAT16_STORED)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.npy"]
    monkeypatch.setattr(type(encoder), "forward", None)
    assert np.array_equal(cached_features(encoder, dataset, spec, path), found)


def planted(clips: int, seed: int) -> Features:
    """Tokens of which one, anywhere, carries the answer."""
    rng = np.random.default_rng(seed)
    tokens = 0.1 * rng.standard_normal((clips, 6, 8)).astype(np.float32)
    labels = {"a": rng.integers(0, 2, clips), "b": rng.integers(0, 3, clips)}
    for i in range(clips):
        tokens[i, rng.integers(6), labels["a"][i]] += 3.0
        tokens[i, rng.integers(6), 4 + labels["b"][i]] += 3.0
    return Features(tokens, {name: torch.from_numpy(values) for name, values in labels.items()})


@pytest.mark.parametrize("kind", ["attentive", "linear", "knn"])
def test_probes_find_planted_answers_and_only_those(kind):
    # The worst of the penalties and rates must lose on the held-out clips.
    seeds, rates = ((0, 1), (1e-5, 1e-2)) if kind == "attentive" else ((0,), (1.0,))
    options = dict(batch_size=16, heads=2, learning_rates=rates, weight_decays=(0.01,))
    options["penalties"] = (1e-3, 1e3)
    cfg = ProbeConfig(seeds=seeds, steps=200, **options)
    train, test, classes = planted(512, 0), planted(64, 1), {"a": 2, "b": 3}
    result = probed(cfg, kind, train, test, classes)["questions"]
    for name in classes:
        assert result[name]["top1"] > 0.75
        assert result[name]["train"] > 0.75
        low, high = result[name]["interval"]
        assert low < result[name]["top1"] < high or result[name]["top1"] == 1.0
        assert len(result[name]["seeds"]) == len(seeds)
    noise = Features(
        train.tokens,
        {name: values[torch.randperm(len(values))] for name, values in train.labels.items()},
    )
    shuffled = probed(cfg, kind, noise, test, classes)["questions"]
    assert shuffled["b"]["top1"] < 0.6


def test_a_probe_says_whether_it_has_converged():
    train, test, classes = planted(256, 0), planted(64, 1), {"a": 2, "b": 3}
    cfg = ProbeConfig(heads=2, learning_rates=(1e-3,), weight_decays=(0.01,))
    for kind, steps, expected in (
        ("attentive", 4, False),
        ("linear", 1, False),
        ("linear", 2000, True),
    ):
        training = probed(replace(cfg, steps=steps), kind, train, test, classes)["training"]
        assert training["converged"] is expected, (kind, steps)


def test_convergence_is_read_from_the_curve():
    assert not has_converged([4.0, 3.0])
    assert not has_converged(np.linspace(2.0, 1.0, 20))
    assert has_converged(1.0 + np.exp(-np.arange(20.0)))
    assert has_converged(np.ones(20))


def test_weight_decay_is_chosen_on_validation_clips_alone():
    """The test clips have no say: turning all their labels around does not change the choice."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((96, 1, 64)).astype(np.float32)
    labels = {
        "a": torch.from_numpy((tokens[:, 0, 0] + 2 * rng.standard_normal(96) > 0).astype(int))
    }
    cfg = ProbeConfig(penalties=(1e-4, 10.0))
    train = Features(tokens, labels)
    chosen = {
        probed(cfg, "linear", train, Features(tokens, answers), {"a": 2})["training"]["decay"][0]
        for answers in (labels, {"a": 1 - labels["a"]})
    }
    assert len(chosen) == 1


def test_a_linear_probe_reaches_directions_that_hardly_vary():
    """An answer in a direction a thousand times smaller than the others: whitening finds it."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((600, 1, 8)) * np.array([1.0] * 7 + [1e-3])
    labels = {"a": torch.from_numpy((hidden[:, 0, 7] > 0).astype(int))}
    rotated = (hidden @ np.linalg.qr(rng.standard_normal((8, 8)))[0]).astype(np.float32)
    train, test = (
        Features(rotated[rows], {"a": labels["a"][rows]}) for rows in (slice(400), slice(400, 600))
    )
    result = probed(ProbeConfig(), "linear", train, test, {"a": 2})
    assert result["questions"]["a"]["top1"] > 0.95
    assert result["training"]["converged"]


def test_a_probe_depends_on_its_seed_only():
    cfg, train = ProbeConfig(steps=2, heads=2), planted(32, 0)

    def trained(seed):
        probe = train_probe(cfg, "attentive", train, np.arange(32), {"a": 2}, seed, 1e-3, 0.0).probe
        return probe.linear.weight

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


@pytest.mark.parametrize("classes", [48, 101, 174])
def test_published_probes_have_one_query_and_their_classes(classes):
    one = Probe("attentive", 24, 3, {"class": classes})
    assert one.pooler.query_tokens.shape == (1, 1, 24)
    assert one(torch.randn(2, 5, 24))["class"].shape == (2, classes)
    with pytest.raises(ConfigError, match="heads must divide the feature width 24, got 5"):
        Probe("attentive", 24, 5, {"class": classes})


def test_probing_a_run_reports_every_factor_beside_the_baselines(tiny, capsys, caplog):
    options = ["train_clips=16", "test_clips=8", "steps=4", "seeds=[0]", "threads=1"]
    assert cli.main(["probe", f"run={tiny}", *options]) == 0
    report = json.loads((tiny / "probe.json").read_text())
    assert list(report["results"]) == ["linear", "attentive", "knn"]
    for kind, results in report["results"].items():
        expected = ["trained", "untrained", *(["pixels"] if kind != "attentive" else [])]
        assert list(results) == expected
        for result in results.values():
            assert list(result["questions"]) == list(FACTORS)
    shown = capsys.readouterr().out
    assert "appearance" in shown and "motion" in shown and "direction" in shown
    assert "the attentive probe of trained has not converged in 4 steps" in caplog.text
    cached = sorted((tiny / "features").iterdir())
    assert len(cached) == 4
    before = [entry.stat().st_mtime_ns for entry in cached]
    assert cli.main(["probe", f"run={tiny}", "kinds=[linear]", *options]) == 0
    assert [entry.stat().st_mtime_ns for entry in sorted((tiny / "features").iterdir())] == before


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_finetuning_learns_with_and_without_the_objective(tiny, tmp_path, weight):
    cfg = FinetuneConfig(
        run=tiny,
        train_clips=8,
        test_clips=4,
        steps=30,
        batch_size=8,
        rate=3e-3,
        warmup_steps=2,
        objective_weight=weight,
        threads=1,
        data=DataConfig(target="colour"),
        output=tmp_path / "result.json",
    )
    report = finetune.run(cfg)
    assert report["loss_last"] < 0.8 * report["loss_first"]
    assert json.loads((tmp_path / "result.json").read_text())["test_clips"] == 4
    assert 0.0 <= report["interval"][0] <= report["top1"] <= report["interval"][1] <= 1.0


def test_a_resumed_fine_tuning_is_bitwise_equal_and_another_one_starts_over(
    tiny, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    cfg = FinetuneConfig(
        run=tiny,
        train_clips=8,
        test_clips=4,
        steps=7,
        batch_size=2,
        objective_weight=0.5,
        threads=1,
        checkpoint_every=2,
        data=DataConfig(target="colour"),
        output=tmp_path / "whole.json",
    )
    whole = finetune.run(cfg)

    class StoppedError(Exception):
        pass

    def stops(fraction, inner=finetune.learning_rate):
        def rate(cfg, step):
            if step > fraction:
                raise StoppedError
            return inner(cfg, step)

        return rate

    parts = replace(cfg, output=tmp_path / "parts.json", workers=1)
    for last in (3, 5):
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "learning_rate", stops(last))
            with pytest.raises(StoppedError):
                finetune.run(parts)
    report = finetune.run(parts)
    assert "resumed from step 2 of" in caplog.text
    assert "resumed from step 4 of" in caplog.text
    assert {**report, "test_s": 0} == {**whole, "test_s": 0}
    first, second = (Checkpoints(tmp_path / name / "checkpoints") for name in ("whole", "parts"))
    assert first.steps() == second.steps() == [7]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (first.path(7) / file).read_bytes() == (second.path(7) / file).read_bytes()
    assert finetune.run(parts)["top1"] == whole["top1"]
    assert "starting over" not in caplog.text
    finetune.run(replace(parts, rate=2e-3, steps=1))
    assert "starting over" in caplog.text
    assert "another value of rate, steps" in caplog.text
    assert second.steps() == [1]
    finetune.run(replace(parts, rate=2e-3, steps=1, resume=False))
    assert "resume is off" in caplog.text


def test_rates_fall_layer_by_layer(tiny):
    bundle, cfg, _ = load_bundle(tiny)
    head = Probe("attentive", cfg.model.width, 3, {"class": 2})
    groups = layer_groups(bundle, head, FinetuneConfig(layer_decay=0.5), True)
    scale = {id(p): group["rate_scale"] for group in groups for p in group["params"]}
    encoder = bundle.context_encoder
    assert scale[id(encoder.patch_embed.proj.weight)] == 0.125
    assert [scale[id(block.mlp.fc1.weight)] for block in encoder.blocks] == [0.25, 0.5]
    assert scale[id(head.linear.weight)] == scale[id(next(bundle.predictor.parameters()))] == 1.0
    assert not any(id(p) in scale for p in bundle.target_encoder.parameters())
    assert all(group["weight_decay"] == 0.0 for group in groups if group["params"][0].ndim == 1)


def test_encode_writes_a_file_per_video_and_names_bad_ones(tiny, tmp_path, shared_dir, caplog):
    source = tmp_path / "videos"
    (source / "deep").mkdir(parents=True)
    clips = sorted((shared_dir / "clips" / "ucf101" / "videos").rglob("*.avi"))[:2]
    for clip, name in zip(clips, ("a.avi", "deep/b.avi")):
        (source / name).symlink_to(clip)
    (source / "bad.mp4").write_bytes(b"no video")
    (source / "notes.txt").write_text("ignored")
    out = tmp_path / "features"
    written, bad = encode.run(encode.EncodeConfig(source, out, run=tiny, clips=2, threads=1))
    assert (written, bad) == (2, 1)
    assert "bad.mp4" in caplog.text
    features = load_file(out / "deep" / "b.avi.safetensors")["features"]
    assert features.shape == (2, 2 * 4 * 4, 24) and features.dtype == torch.float16
    assert features.isfinite().all() and not torch.equal(features[0], features[1])
    assert encode.run(encode.EncodeConfig(source, out, run=tiny, clips=2, threads=1)) == (0, 1)
    # One clip is another size than two.
    assert encode.run(encode.EncodeConfig(source, out, run=tiny, threads=1)) == (2, 1)


def test_encode_refuses_what_is_not_there(tiny, tmp_path):
    with pytest.raises(ConfigError, match="where nothing is"):
        encode.run(encode.EncodeConfig(tmp_path / "none", tmp_path / "out", run=tiny))
    with pytest.raises(ConfigError, match="got none in"):
        encode.run(encode.EncodeConfig(tmp_path, tmp_path / "out", run=tiny))


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_two_commands_of_the_readme_put_motion_into_frozen_features(tmp_path):
    """At the recipe's length, which takes minutes: after a third of it nothing is gained yet."""
    run = tmp_path / "demo"
    one = ["threads=1", "device=cpu"]
    assert cli.main(["pretrain", f"output={run}", *one]) == 0
    clips = ["train_clips=1536", "test_clips=1024", "kinds=[linear]", "pixels=false"]
    assert cli.main(["probe", f"run={run}", *clips, *one]) == 0
    report = json.loads((run / "probe.json").read_text())["results"]["linear"]
    motion = {
        name: np.mean([result["questions"][q]["top1"] for q in ("direction", "speed")])
        for name, result in report.items()
    }
    assert all(result["training"]["converged"] for result in report.values())
    assert motion["trained"] > motion["untrained"] + 0.05
