"""Classifiers from class means against scikit-learn, and against loops over classes."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics.pairwise import cosine_similarity

from tail_jax import analytic

CLASSES, WIDTH, UNSEEN = 9, 13, (0, 6)


@pytest.fixture(scope="module")
def data():
    """(z, labels) of unbalanced classes with covariances of their own, and rows to test."""
    random = np.random.default_rng(0)
    seen = np.setdiff1d(np.arange(CLASSES), UNSEEN)
    labels = np.r_[seen, seen, random.choice(seen, 250, p=np.arange(1, 8) / 28)]
    shapes = random.normal(size=(CLASSES, WIDTH, WIDTH))
    noise = np.einsum("nd,nde->ne", random.normal(size=(len(labels), WIDTH)), shapes[labels])
    z = 3 * random.normal(size=(CLASSES, WIDTH))[labels] + noise + 2
    return z, labels, 4 * random.normal(size=(101, WIDTH)) + 2


def state_of(z, labels, second, size=17):
    state = analytic.empty_moments(CLASSES, WIDTH, second)
    for first in range(0, len(labels), size):
        rows = slice(first, first + size)
        state = analytic.accumulate(state, z[rows], labels[rows])
    return state


def rules(z, labels, tested, size=17):
    """Scores of all three classifiers."""
    shared = state_of(z, labels, "shared", size)
    return {
        "cosine": analytic.cosine_scores(state_of(z, labels, "none", size), tested),
        "discriminant": analytic.linear_discriminant_scores(
            *analytic.linear_discriminant(shared), tested, shared["counts"] > 0),
        "fecam": analytic.fecam_scores(state_of(z, labels, "class", size), tested, added=0.5)}


def test_cosine_scores_are_scikit_learns_similarity_to_the_mean_of_each_class(data):
    z, labels, tested = data
    found = rules(*data)["cosine"]
    for c in np.unique(labels):
        expected = cosine_similarity(tested, z[labels == c].mean(0)[None])[:, 0]
        np.testing.assert_allclose(found[:, c], expected, atol=1e-12)


def test_nearest_mean_of_a_hand_worked_example():
    """Means (2, 1) of (4, 0), (0, 2), and (0, 3); (1, 1): cosines 3 / sqrt 10 and 1 / sqrt 2."""
    state = analytic.accumulate(
        analytic.empty_moments(3, 2, "none"), np.array([[4.0, 0], [0, 2], [0, 3]]),
        np.array([1, 1, 2]))
    scores = analytic.cosine_scores(state, np.array([[1.0, 1.0]]))
    np.testing.assert_allclose(scores, [[-np.inf, 3 / 10**0.5, 1 / 2**0.5]])


def test_discriminant_is_scikit_learns_less_the_log_priors(data):
    z, labels, tested = data
    # Ours adds s of the mean variance, scikit-learn shrinks: (1 - t) S + t tr(S) / D I.
    shrinkage = 0.05
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage / (1 + shrinkage))
    peer.fit(z, labels)
    state = state_of(z, labels, "shared")
    weight, bias = analytic.linear_discriminant(state, shrinkage)
    found = analytic.linear_discriminant_scores(weight, bias, tested, state["counts"] > 0)
    seen = np.unique(labels)
    expected = (peer.decision_function(tested) - np.log(peer.priors_)) / (1 + shrinkage)
    np.testing.assert_allclose(found[:, seen], expected, rtol=1e-9, atol=1e-9)
    # Without shrinkage to speak of, the same decisions as the solver by singular values.
    plain = LinearDiscriminantAnalysis().fit(z, labels)
    weight, bias = analytic.linear_discriminant(state, 1e-12)
    found = analytic.linear_discriminant_scores(weight, bias, tested, state["counts"] > 0)
    np.testing.assert_array_equal(
        (found[:, seen] + np.log(plain.priors_)).argmax(1),
        plain.decision_function(tested).argmax(1))


def test_fecam_equals_a_loop_over_classes_and_rows(data):
    z, labels, tested = data
    found = rules(*data)["fecam"]
    for c in np.unique(labels):
        rows = z[labels == c]
        covariance = np.cov(rows.T) + 0.5 * np.eye(WIDTH)
        correlation = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
        inverse = np.linalg.inv(correlation)
        mean = rows.mean(0) / np.linalg.norm(rows.mean(0))
        for row, score in zip(tested, found[:, c]):
            difference = row / np.linalg.norm(row) - mean
            assert -score == pytest.approx(difference @ inverse @ difference, rel=1e-9)


def test_fecam_of_single_clips_is_the_nearest_unit_mean():
    z = np.array([[3.0, 4.0], [5.0, 0.0]])
    state = analytic.accumulate(analytic.empty_moments(2, 2, "class"), z, np.array([0, 1]))
    scores = analytic.fecam_scores(state, np.array([[0.0, 2.0]]))
    np.testing.assert_allclose(scores, [[-0.4, -2.0]])  # 0.6^2 + 0.2^2; 1 + 1


@pytest.mark.parametrize("rule", ["cosine", "discriminant", "fecam"])
def test_scores_depend_neither_on_the_order_of_clips_nor_on_batches(data, rule):
    z, labels, tested = data
    order = np.random.default_rng(1).permutation(len(labels))
    found = rules(*data)[rule]
    for other in (rules(z[order], labels[order], tested), rules(*data, size=1000),
                  rules(z[::-1], labels[::-1], tested, size=1)):
        np.testing.assert_allclose(other[rule], found, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("second", ["none", "shared", "class"])
def test_merged_sums_are_those_of_all_clips(data, second):
    z, labels, _ = data
    parts = [state_of(z[rows], labels[rows], second)
             for rows in (slice(40, 41), slice(41, None), slice(0, 40))]
    merged, whole = analytic.merge(*parts), state_of(z, labels, second)
    assert merged.keys() == whole.keys()
    for name in whole:
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("rule", ["cosine", "discriminant", "fecam"])
def test_unseen_classes_have_the_score_minus_infinity_and_are_never_chosen(data, rule):
    scores = rules(*data)[rule]
    seen = np.setdiff1d(np.arange(CLASSES), UNSEEN)
    assert np.isneginf(scores[:, list(UNSEEN)]).all() and np.isfinite(scores[:, seen]).all()
    assert not np.isin(scores.argmax(1), UNSEEN).any()


def test_scores_on_devices_and_on_the_host_leave_out_the_same_classes():
    scores, seen = np.array([[-3.0, 0.0, -1.0]], np.float32), np.array([True, False, True])
    host, device = (analytic.only_seen(s, seen) for s in (scores, jnp.asarray(scores)))
    np.testing.assert_array_equal(host, [[-3, -np.inf, -1]])
    np.testing.assert_array_equal(device, host)


def test_clips_that_are_all_equal_are_one_clear_error():
    state = analytic.accumulate(analytic.empty_moments(2, 3), np.ones((4, 3)), np.array([0] * 4))
    with pytest.raises(ValueError, match="not positive definite; expected features that vary"):
        analytic.linear_discriminant(state)
