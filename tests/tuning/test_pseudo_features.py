"""Statistics of classes and draws by NumPy and scikit-learn; classifiers fitted to draws."""

import jax
import numpy as np
import pytest
from sklearn.cluster import KMeans

from tail_jax.tuning.pseudo_features import (FLOOR, add_classes, class_means, draw, fit, init_mlp,
                                             linear, mlp, no_statistics)

CLASSES, CENTROIDS, WIDTH = 5, 3, 4


def groups(seed, sizes=(7, 4, 9), scale=10):
    """Features of groups far apart, and the number of the group of each."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(sizes), WIDTH)) * scale
    number = np.repeat(np.arange(len(sizes)), sizes)
    return (centres[number] + rng.normal(0, 0.3, (len(number), WIDTH))).astype(np.float32), number


def two_classes():
    (x1, _), (x2, _) = groups(1), groups(2, (5, 3, 3))
    features, labels = np.concatenate([x1, x2]), np.repeat([1, 4], [len(x1), len(x2)])
    mixed = np.random.default_rng(3).permutation(len(labels))
    empty = no_statistics(CLASSES, CENTROIDS, WIDTH)
    return add_classes(empty, features[mixed], labels[mixed], 0), {1: x1, 4: x2}


def test_centroids_have_mean_variance_and_share_of_the_clips_nearest_to_them():
    statistics, features = two_classes()
    for c, x in features.items():
        label = KMeans(CENTROIDS, n_init=10, random_state=0).fit(x).labels_
        expected = [(np.mean(label == k), x[label == k].mean(0), x[label == k].var(0))
                    for k in range(CENTROIDS)]
        found = sorted(zip(*(statistics[name][c] for name in ("share", "mean", "variance"))),
                       key=lambda part: part[1][0])
        for mine, other in zip(found, sorted(expected, key=lambda part: part[1][0]), strict=True):
            for a, b in zip(mine, other):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not any(x[[0, 2, 3]].any() for x in statistics.values())
    np.testing.assert_allclose(class_means(statistics)[1], features[1].mean(0), atol=1e-5)


def test_classes_of_earlier_sessions_keep_their_bits_and_few_clips_are_their_own_centroids():
    before, _ = two_classes()
    x = np.random.default_rng(5).normal(size=(2, WIDTH)).astype(np.float32)
    after = add_classes(before, x, np.array([2, 2]), 0)
    for name in before:
        np.testing.assert_array_equal(after[name][[0, 1, 3, 4]], before[name][[0, 1, 3, 4]])
    assert sorted(after["share"][2].tolist()) == [0, 0.5, 0.5]
    assert not after["variance"][2].any()
    np.testing.assert_allclose(np.sort(after["mean"][2][after["share"][2] > 0], 0), np.sort(x, 0))


def test_draws_have_the_moments_of_the_classes():
    statistics, features = two_classes()
    present = np.isin(np.arange(CLASSES), [1, 4])
    count = 20000
    x, c = map(np.asarray, jax.jit(draw, static_argnums=3)(
        jax.random.key(0), statistics, present, count))
    assert set(c) == {1, 4}
    assert np.mean(c == 1) == pytest.approx(0.5, abs=4 * 0.5 / count**0.5)
    for k, own in features.items():
        drawn, variance = x[c == k], own.var(0) + FLOOR
        error = np.sqrt(variance / len(drawn))
        np.testing.assert_array_less(np.abs(drawn.mean(0) - own.mean(0)), 4.5 * error)
        np.testing.assert_allclose(drawn.var(0), variance, rtol=0.06)


def test_network_fitted_to_draws_tells_the_session_of_separable_features():
    sessions, per_session = 3, 2
    features, labels = groups(6, (8,) * 6, scale=2)
    statistics = add_classes(no_statistics(8, 2, WIDTH), features, labels, 0)
    present, targets = np.arange(8) < 6, np.int32([0, 0, 1, 1, 2, 2, -1, -1])
    outputs = np.arange(5) < sessions
    parameters = fit(mlp, init_mlp(jax.random.key(0), WIDTH, 5), statistics, present, targets,
                     outputs, jax.random.key(1), np.int32(400), np.float32(0.05), np.float32(0.9),
                     batch=24)
    fresh, of = groups(6, (8,) * 6, scale=2)
    fresh += np.random.default_rng(7).normal(0, 0.1, fresh.shape)
    said = np.asarray(mlp(parameters, fresh))[:, :sessions].argmax(1)
    assert (said == of // per_session).all()
    bias = np.asarray(parameters["output"]["bias"])
    assert not bias[3:].any()  # outputs that are off get no gradient


def test_fit_is_sgd_with_momentum_and_a_cosine():
    statistics, _ = two_classes()
    statistics["variance"][:] = -FLOOR  # each draw is the one centroid of its class
    statistics["share"][:] = [1, 0, 0]
    present = np.isin(np.arange(CLASSES), [1])
    start = {"kernel": np.zeros((WIDTH, 2), np.float32), "bias": np.zeros(2, np.float32)}
    targets, steps, rate, momentum = np.int32([0, 1, 0, 0, 0]), 3, 0.01, 0.9
    got = fit(linear, start, statistics, present, targets, np.ones(2, bool), jax.random.key(0),
              np.int32(steps), np.float32(rate), np.float32(momentum), batch=4)
    x, w, b = statistics["mean"][1, 0].astype(np.float64), np.zeros((WIDTH, 2)), np.zeros(2)
    v, u = np.zeros_like(w), np.zeros_like(b)
    for i in range(steps):
        p = np.exp(x @ w + b)
        g = p / p.sum() - [0, 1]
        v, u = momentum * v + np.outer(x, g), momentum * u + g
        factor = rate * (1 + np.cos(np.pi * i / steps)) / 2
        w, b = w - factor * v, b - factor * u
    np.testing.assert_allclose(got["kernel"], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["bias"], b, rtol=1e-4, atol=1e-6)
