"""moving_shapes: independent factors, motion invisible in one frame, the same pixels every time."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jepa.data import moving_shapes
from jepa.data.clip import ClipSpec
from jepa.data.moving_shapes import APPEARANCE, FACTORS, MOTION, MovingShapes
from jepa_kernels.testing import DRAWN_CENTRE

TRAIN, TEST, SIDE, FRAMES = 1200, 400, 24, 8


@pytest.fixture(scope="module")
def sample():
    """Clips [n, F, side, side, 3] and factor labels of a train and a test part."""
    data = MovingShapes(TRAIN + TEST, seed=1)
    clips = np.stack([data.render(i, FRAMES, SIDE, SIDE) for i in range(TRAIN + TEST)])
    return clips, data.factors(np.arange(TRAIN + TEST))


def probe_accuracies(features, labels):
    """Test accuracy per factor of ridge regression to one-hot labels, on standardised features (one
    solve for all factors)."""
    train, test = features[:TRAIN].astype(np.float64), features[TRAIN:].astype(np.float64)
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    gram = train @ train.T
    gram[np.diag_indices(TRAIN)] += 0.3 * np.trace(gram) / TRAIN
    one_hots = [np.eye(values.max() + 1)[values[:TRAIN]] for values in labels.values()]
    ends = np.cumsum([one.shape[1] for one in one_hots])[:-1]
    targets = np.concatenate(one_hots, axis=1)
    scores = test @ (train.T @ np.linalg.solve(gram, targets - targets.mean(axis=0)))
    guesses = [part.argmax(axis=1) for part in np.split(scores, ends, axis=1)]
    return {
        name: (guess == labels[name][TRAIN:]).mean()
        for name, guess in zip(labels, guesses, strict=True)
    }


def single_frame_features(clips, frame):
    """Pixels of one frame and a random nonlinear expansion of them."""
    pixels = clips[:, frame].reshape(len(clips), -1) / 255.0
    projection = np.random.default_rng(0).standard_normal((pixels.shape[1], 400)) / np.sqrt(
        pixels.shape[1]
    )
    return np.concatenate([pixels, np.maximum((pixels - 0.5) @ projection * 4, 0)], axis=1)


def four_errors_above(chance):
    return chance + 4 * np.sqrt(chance * (1 - chance) / TEST)


@pytest.mark.parametrize("frame", [0, FRAMES - 2])
def test_one_frame_says_nothing_about_motion(sample, frame):
    clips, labels = sample
    accuracy = probe_accuracies(single_frame_features(clips, frame), labels)
    for name, classes in MOTION.items():
        assert accuracy[name] <= four_errors_above(1 / len(classes)), name
    # The same probe reads appearance, so it is no blind judge.
    assert accuracy["colour"] > 0.3
    assert accuracy["background"] > 0.5


def test_several_frames_do_say_it(sample):
    """Where the coloured pixels go (circular cross-correlation of frames four apart), and when
    there are none."""
    clips, labels = sample
    shapes = clips.max(axis=-1).astype(np.float64) - clips.min(axis=-1)
    spectrum = np.fft.rfft2(shapes)
    moves = np.fft.irfft2((spectrum[:, 4:] * spectrum[:, :-4].conj()).mean(axis=1), s=(SIDE, SIDE))
    moves /= moves.max(axis=(1, 2), keepdims=True) + 1e-9
    accuracy = probe_accuracies(moves.reshape(len(clips), -1), labels)
    assert accuracy["direction"] > 0.5
    assert accuracy["speed"] > 0.5
    hides = np.abs(np.fft.rfft((shapes.max(axis=(2, 3)) > 20).astype(np.float64), axis=1))
    assert probe_accuracies(hides, labels)["occlusion"] > 0.9


def test_state_at_every_time_is_uniform_in_every_motion_class():
    """The reason behind the probes: position, angle and visibility at any time have one
    distribution, whatever the motion."""
    data = MovingShapes(3000, seed=2)
    draws = data._draws(np.arange(3000))
    labels = data.factors(np.arange(3000))
    states = []
    for row, kinds in zip(draws, zip(*labels.values(), strict=True), strict=True):
        free = dict(zip(moving_shapes._NUISANCES, row[len(FACTORS) :].tolist(), strict=False))
        y, x, angle, seen = moving_shapes._trajectory(
            dict(zip(FACTORS, map(int, kinds), strict=True)), free, 16, 32, 48
        )
        states.append([y[11] / 32, x[11] / 48, angle[11] / (2 * np.pi) % 1.0, seen[11]])
    state = np.array(states)
    p_values = []
    for name, classes in MOTION.items():
        for k in range(len(classes)):
            chosen = state[labels[name] == k]
            p_values += [stats.kstest(chosen[:, i], "uniform").pvalue for i in range(3)]
            p_values.append(stats.binomtest(int(chosen[:, 3].sum()), len(chosen), 0.75).pvalue)
    # Some ninety tests: the smallest p-value of honest ones is above this with probability .999.
    assert min(p_values) > 1e-3 / len(p_values)


def test_factors_are_uniform_and_independent():
    labels = MovingShapes(6000, seed=3).factors(np.arange(6000))
    assert set(labels) == set(APPEARANCE) | set(MOTION)
    names = list(FACTORS)
    p_values = [
        stats.chisquare(np.bincount(labels[n], minlength=len(FACTORS[n]))).pvalue for n in names
    ]
    for i, first in enumerate(names):
        for second in names[:i]:
            table = np.zeros((len(FACTORS[first]), len(FACTORS[second])))
            np.add.at(table, (labels[first], labels[second]), 1)
            p_values.append(stats.chi2_contingency(table).pvalue)
    assert min(p_values) > 1e-3 / len(p_values)


def test_samples_are_a_function_of_seed_split_and_index():
    data, again = MovingShapes(50, seed=4), MovingShapes(999, seed=4)
    np.testing.assert_array_equal(data.render(7, 5, 20, 31), again.render(7, 5, 20, 31))
    assert (data.render(7, 5, 20, 31) != data.render(8, 5, 20, 31)).any()
    assert (data.render(7, 5, 20, 31) != MovingShapes(50, seed=5).render(7, 5, 20, 31)).any()
    assert (
        data.render(7, 5, 20, 31) != MovingShapes(50, seed=4, split="test").render(7, 5, 20, 31)
    ).any()
    # A longer clip of constant motion starts alike; a clip never depends on the stride or the draw.
    np.testing.assert_array_equal(
        data.read(7, ClipSpec(5, 2, None, 20, 31), 0.9).frames, data.render(7, 5, 20, 31)
    )


def test_motion_is_drawn_as_labelled():
    """The centre of the coloured pixels moves by the labelled speed in the labelled direction
    (clips without other motion)."""
    data = MovingShapes(2000, seed=6)
    labels = data.factors(np.arange(2000))
    plain = np.flatnonzero(
        (labels["oscillation"] == 0) & (labels["acceleration"] == 1) & (labels["rotation"] == 1)
    )
    side = 64
    turn = np.exp(2j * np.pi * np.arange(side) / side)
    for i in plain[:30]:
        clip = data.render(int(i), 16, side, side)
        weight = (clip.max(axis=-1).astype(np.float64) - clip.min(axis=-1)) > 20
        visible = weight.any(axis=(1, 2))
        steps = np.flatnonzero(visible[1:] & visible[:-1])
        heading, speed = (
            labels["direction"][i] * np.pi / 4,
            moving_shapes._SPEED[labels["speed"][i]] * side,
        )
        for axis, want in ((1, np.sin(heading)), (2, np.cos(heading))):
            centre = np.angle((weight.sum(axis=3 - axis) * turn).sum(axis=1)) / (2 * np.pi) * side
            moved = (centre[steps + 1] - centre[steps] + side / 2) % side - side / 2
            assert abs(moved.mean() - speed * want) < DRAWN_CENTRE["atol"]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="target must be one of shape, texture"):
        MovingShapes(target="form")
    with pytest.raises(ValueError, match="split must be 'train' or 'test'"):
        MovingShapes(split="val")
    with pytest.raises(IndexError, match=r"index must lie in \[0, 10\)"):
        MovingShapes(10).label(10)


def test_a_path_of_the_callers_own():
    """The shape of a sample where it is told to be, around the edge too; a whole pixel moves it by
    a pixel."""
    data = MovingShapes(40, seed=3)
    index = next(i for i in range(40) if data.factors([i])["background"][0] == 0)  # plain
    path = np.array([[0.5, 0.25], [0.5 + 3 / SIDE, 0.25 - 2 / SIDE], [1.5, -0.75]])
    frames = data.follow(index, path, SIDE, SIDE)
    assert frames.shape == (3, SIDE, SIDE, 3) and frames.dtype == np.uint8
    assert (frames[0] != frames[1]).any()
    np.testing.assert_array_equal(np.roll(frames[0], (-2, 3), axis=(0, 1)), frames[1])
    np.testing.assert_array_equal(frames[0], frames[2])
