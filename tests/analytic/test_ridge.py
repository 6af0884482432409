"""Ridge regression over sessions against scikit-learn's on all data at once."""

import functools

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from tail_jax import analytic
from tests.analytic.ridge_data import (
    CLASSES, FEATURES, SIZES, UNSEEN, WIDTH, embeddings, gamma_of, padded, sessions)

STREAM = sessions()
ALL = tuple(np.concatenate(parts) for parts in zip(*STREAM))


def reference(features, labels, gamma):
    """W [M, C] of scikit-learn."""
    return joint(gamma) if features is ALL[0] else fitted(features, labels, gamma)


@functools.lru_cache
def joint(gamma):
    return fitted(*ALL, gamma)


def fitted(features, labels, gamma):
    model = Ridge(alpha=gamma, fit_intercept=False, solver="svd")
    return model.fit(features, np.eye(CLASSES)[labels]).coef_.T


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def accumulated(batches, gamma, **options):
    state = analytic.empty_moments(CLASSES, FEATURES)
    for batch in batches:
        state = analytic.accumulate(state, *batch, **options)
    return analytic.solve_ridge(state, gamma)


def recursed(batches, gamma, **options):
    state = analytic.start_recursion(CLASSES, FEATURES, gamma)
    for batch in batches:
        state = analytic.recurse(state, *batch, **options)
    return state["weights"]


def split(stream, size):
    """Batches of `size` rows within sessions, the last of each smaller."""
    return [(z[i:i + size], y[i:i + size]) for z, y in stream for i in range(0, len(y), size)]


def shuffled(stream):
    random = np.random.default_rng(0)
    out = []
    for z, y in stream:
        order = random.permutation(len(y))
        out.append((z[order], y[order]))
    return out


def with_padding(stream):
    random = np.random.default_rng(1)
    return [padded(z, y, len(y) + 5, random) for z, y in stream]


ARRIVALS = {
    "sessions": lambda: STREAM,
    "reversed": lambda: STREAM[::-1],
    "shuffled": lambda: shuffled(STREAM),
    "batches of 24": lambda: split(STREAM, 24),
    "single clips": lambda: split(STREAM[:2], 1) + STREAM[2:],
    "all at once": lambda: [ALL],
    "padded": lambda: with_padding(STREAM),
}


@pytest.mark.parametrize("way", [accumulated, recursed])
@pytest.mark.parametrize("arrival", ARRIVALS)
@pytest.mark.parametrize("relative", [1e-1, 1e-2, 1e-3])
def test_weights_are_those_of_scikit_learn_on_all_data_however_it_came(way, arrival, relative):
    gamma = gamma_of(ALL[0], relative)
    assert error(way(ARRIVALS[arrival](), gamma), reference(*ALL, gamma)) <= 1e-8


@pytest.mark.parametrize("way", [accumulated, recursed])
def test_weights_after_each_session_are_those_of_the_data_so_far(way):
    gamma = gamma_of(ALL[0], 1e-2)
    for number in (1, 2, 5):
        so_far = [np.concatenate(parts) for parts in zip(*STREAM[:number])]
        assert error(way(STREAM[:number], gamma), reference(*so_far, gamma)) <= 1e-8


def test_recursion_in_parts_equals_recursion_of_many_rows_at_once(monkeypatch):
    gamma = gamma_of(ALL[0], 1e-2)
    monkeypatch.setattr(analytic.ridge, "ROWS", 100)
    assert error(recursed([ALL], gamma), reference(*ALL, gamma)) <= 1e-8


def test_class_seen_again_in_a_later_session_changes_its_weights_as_joint_training_does():
    gamma = gamma_of(ALL[0], 1e-2)
    first = [(z, np.full(len(y), 2)) for z, y in STREAM[:1]]
    later = [(z, np.where(np.arange(len(y)) % 2, 2, 7)) for z, y in STREAM[1:3]]
    together = tuple(np.concatenate(parts) for parts in zip(*first, *later))
    for way in (accumulated, recursed):
        assert error(way(first + later, gamma), reference(*together, gamma)) <= 1e-8
        assert np.abs(way(first + later, gamma)[:, 2] - way(first, gamma)[:, 2]).max() > 1e-3


def test_sums_of_parts_merge_into_the_sums_of_all():
    empty = analytic.empty_moments(CLASSES, FEATURES)
    parts = [analytic.accumulate(empty, *session) for session in STREAM]
    merged, gamma = analytic.merge(*parts[::2], *parts[1::2]), gamma_of(ALL[0], 1e-2)
    assert error(analytic.solve_ridge(merged, gamma), reference(*ALL, gamma)) <= 1e-8
    assert merged["counts"].sum() == sum(SIZES) and not empty["counts"].any()


def test_gamma_may_change_between_solves_of_the_same_sums():
    state = analytic.accumulate(analytic.empty_moments(CLASSES, FEATURES), *ALL)
    for relative in (1e-4, 1.0, 1e-2):
        gamma = gamma_of(ALL[0], relative)
        assert error(analytic.solve_ridge(state, gamma), reference(*ALL, gamma)) <= 1e-8
        assert analytic.relative_gamma(state, gamma) == pytest.approx(relative)


@pytest.mark.parametrize("way", [accumulated, recursed])
def test_donated_states_give_the_same_bits(way):
    gamma = gamma_of(ALL[0], 1e-2)
    np.testing.assert_array_equal(way(STREAM, gamma, donate=True), way(STREAM, gamma))


@pytest.mark.parametrize("start, step", [
    (analytic.empty_moments, analytic.accumulate),
    (lambda *sizes: analytic.start_recursion(*sizes, 1e3), analytic.recurse)])
def test_states_change_only_where_they_are_donated(start, step):
    before = start(CLASSES, FEATURES)
    copy = {name: array.copy() for name, array in before.items()}
    after = step(before, *STREAM[0])
    assert all(np.array_equal(before[name], copy[name]) for name in copy)
    assert not any(np.shares_memory(before[name], after[name]) for name in copy)
    donated = step(before, *STREAM[0], donate=True)
    assert all(np.shares_memory(before[name], donated[name]) for name in copy)
    frozen = start(CLASSES, FEATURES)
    for array in frozen.values():
        array.flags.writeable = False  # as an array that JAX lends
    assert not any(np.shares_memory(frozen[name], array) for name, array in
                   step(frozen, *STREAM[0], donate=True).items())
    assert all(np.array_equal(frozen[name], copy[name]) for name in copy)


def test_recursion_keeps_the_inverse_of_the_regularised_gram_matrix():
    gamma = gamma_of(ALL[0], 1e-2)
    state = analytic.start_recursion(CLASSES, FEATURES, gamma)
    for session in STREAM:
        state = analytic.recurse(state, *session)
    inverse = analytic.moments.symmetric(state["inverse"])
    expected = np.linalg.inv(ALL[0].T @ ALL[0] + gamma * np.eye(FEATURES))
    assert error(inverse, expected) <= 1e-8
    assert not np.tril(state["inverse"], -1).any()  # one triangle: it cannot lose its symmetry


def test_unseen_classes_are_never_chosen_where_their_zero_would_be_the_largest_score():
    """(1, 2) w = 1 and (2, 5) w = 1 have w = (3, -1), which gives (0, 1) the score -1."""
    state = analytic.accumulate(
        analytic.empty_moments(3, 2), np.array([[1.0, 2.0], [2.0, 5.0]]), np.array([1, 1]))
    weights = analytic.solve_ridge(state, 1e-9)
    np.testing.assert_allclose(weights, [[0, 3, 0], [0, -1, 0]], atol=1e-6)
    scores = analytic.ridge_scores(weights, np.array([[0.0, 1.0]]), np.eye(2), state["counts"] > 0)
    np.testing.assert_allclose(scores, [[-np.inf, -1, -np.inf]], atol=1e-6)
    assert scores.argmax() == 1


def test_classes_of_no_session_are_in_no_prediction_of_the_stream():
    random = np.random.default_rng(5)
    state = analytic.accumulate(analytic.empty_moments(CLASSES, FEATURES), *ALL)
    scores = analytic.ridge_scores(
        analytic.solve_ridge(state, gamma_of(ALL[0], 1e-2)), 20 * random.normal(size=(1501, WIDTH)),
        analytic.projection(4, WIDTH, FEATURES), state["counts"] > 0)
    assert np.isneginf(scores[:, UNSEEN]).all() and np.isfinite(scores.max(1)).all()
    assert not np.isin(scores.argmax(1), UNSEEN).any()


def test_scores_of_training_clips_say_their_class():
    random = np.random.default_rng(6)
    labels = np.setdiff1d(np.arange(CLASSES), UNSEEN).repeat(3)
    state = analytic.accumulate(analytic.empty_moments(CLASSES, FEATURES), *ALL)
    scores = analytic.ridge_scores(
        analytic.solve_ridge(state, gamma_of(ALL[0], 1e-2)), embeddings(random, labels),
        analytic.projection(4, WIDTH, FEATURES), state["counts"] > 0)
    assert (scores.argmax(1) == labels).mean() > 0.9


def test_recursion_is_chosen_for_small_sessions_and_accumulation_for_large():
    timit, keywords = [16] * 315, [12000] * 7
    assert analytic.recursion_is_faster(timit, 8192, 630)
    assert not analytic.recursion_is_faster(keywords, 8192, 35)
    limits = [n for n in range(1, 4000) if analytic.recursion_is_faster([n], 8192, 50)]
    assert 1000 < len(limits) == limits[-1] < 1300  # below one limit, and not above


@pytest.mark.parametrize("kind, bound", [("normal", None), ("uniform", 1 / 768**0.5)])
def test_projection_has_its_distribution_and_depends_on_the_seed_alone(kind, bound):
    w_p = analytic.projection(7, 768, 333, kind)
    assert w_p.dtype == np.float32 and w_p.shape == (768, 333)
    np.testing.assert_array_equal(w_p, analytic.projection(7, 768, 333, kind))
    assert not np.array_equal(w_p, analytic.projection(8, 768, 333, kind))
    variance = 1 if bound is None else bound**2 / 3
    assert abs(w_p.mean()) < 0.01 * variance**0.5
    assert w_p.var() == pytest.approx(variance, rel=0.01)
    if bound:
        assert 0.99 * bound < np.abs(w_p).max() <= np.float32(bound)


def test_random_features_are_positive_parts_with_zeros_on_padding():
    z, w_p = np.array([[1.0, -2.0], [3.0, 1.0]]), np.array([[1.0, -1.0, 0.5], [1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(analytic.random_features(z, w_p), [[0, 0, 0], [4, 0, 2.5]])
    np.testing.assert_array_equal(
        analytic.random_features(z, w_p, np.array([True, False])), np.zeros((2, 3)))


@pytest.mark.parametrize("call, message", [
    (lambda s: analytic.accumulate(s, np.ones((2, 5)), np.zeros(2, int)), r"expected \[n, 512\]"),
    (lambda s: analytic.accumulate(s, np.ones((2, 512)), np.zeros(3, int)), r"expected \[n, 512\]"),
    (lambda s: analytic.accumulate(s, np.ones((2, 512)), np.array([0, 29])), "label 29; expected"),
    (lambda s: analytic.accumulate(s, np.ones((2, 512)), np.array([-1, 3])), "label -1; expected"),
    (lambda s: analytic.accumulate(s, np.full((1, 512), np.nan), np.array([0])), "row 0 are not"),
    (lambda s: analytic.solve_ridge(s, 0.0), "gamma is 0; expected a positive number"),
    (lambda s: analytic.start_recursion(3, 4, -1.0), "gamma is -1; expected a positive number"),
    (lambda s: analytic.solve_ridge(analytic.accumulate(s, *STREAM[1]), 1e-15), "raise gamma"),
    (lambda s: analytic.projection(0, 3, 4, "normals"), "expected one of normal, uniform"),
    (lambda s: analytic.empty_moments(3, 4, "all"), "expected one of none, shared, class"),
])
def test_what_cannot_be_used_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(analytic.empty_moments(CLASSES, FEATURES))
