"""The strength of the ridge: closed forms against fitting again."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from tail_jax import analytic
from tests.analytic.ridge_data import gamma_of, sessions

STREAM = sessions()
Z, Y = (np.concatenate(parts) for parts in zip(*STREAM[:2]))  # 148 rows, 512 features


def targets(labels):
    return np.eye(labels.max() + 1)[labels][:, np.unique(labels)]


def fit(z, y, gamma):
    return Ridge(alpha=gamma, fit_intercept=False, solver="svd").fit(z, y).coef_.T


@pytest.mark.parametrize("width", [512, 31])  # more features than rows, and fewer
@pytest.mark.parametrize("relative", [1e-4, 1e-2, 1.0, 1e3])
def test_leave_one_out_equals_fitting_again_without_each_row(width, relative):
    labels = Y[:63]
    z, y = Z[:63, :width], targets(labels)
    gamma = gamma_of(z, relative)
    again = []
    for row in range(len(z)):
        kept = np.arange(len(z)) != row
        again.append(y[row] - z[row] @ fit(z[kept], y[kept], gamma))
    found = analytic.leave_one_out(z, labels, gammas=np.array([gamma]))
    expected = np.mean(np.square(again))
    assert abs(found.errors[0] - expected) <= 1e-10 * max(expected, 1)
    assert found.gamma == gamma
    scatter = np.square(again).mean(1).std() / len(z) ** 0.5
    assert found.deviations[0] == pytest.approx(scatter, rel=1e-8)


def test_leave_one_out_takes_the_power_of_ten_with_the_least_error():
    choice = analytic.leave_one_out(Z, Y)
    np.testing.assert_allclose(choice.gammas, [10.0**k for k in range(-8, 9)])
    assert np.isfinite(choice.errors).all()
    assert choice.gamma == choice.gammas[choice.errors.argmin()]
    assert 1e-8 < choice.gamma < 1e8
    # Far too strong a ridge predicts zero, whose mean square error is 1 / (classes that occur).
    huge = analytic.leave_one_out(Z, Y, gammas=np.array([1e30]))
    assert huge.errors[0] == pytest.approx(1 / len(np.unique(Y)))


def test_one_standard_error_rule_takes_the_strongest_that_rows_cannot_tell_from_the_best():
    """Least error 2 at gamma 1, with standard error 0.5: 2.4 is within it, 2.6 is not."""
    choice = analytic.GammaChoice(1.0, np.array([0.1, 1.0, 10.0, 100.0]),
                                  np.array([2.1, 2.0, 2.4, 2.6]), np.array([9.0, 0.5, 9.0, 9.0]))
    assert choice.one_se == 10.0 and choice._replace(deviations=np.zeros(4)).one_se == 1.0


def test_leave_one_out_of_many_rows_takes_some_of_them_by_the_seed():
    few = analytic.leave_one_out(Z, Y, most_rows=50, seed=1)
    rows = np.sort(np.random.default_rng(1).permutation(len(Y))[:50])
    np.testing.assert_array_equal(few.errors, analytic.leave_one_out(Z[rows], Y[rows]).errors)
    other = analytic.leave_one_out(Z, Y, most_rows=50, seed=2)
    assert not np.array_equal(few.errors, other.errors)


def test_equal_clips_of_other_classes_do_not_break_the_smallest_gammas():
    z, labels = np.tile(Z[:20], (3, 1)), np.r_[Y[:20], Y[20:40], Y[20:40]]  # K [60, 60] of rank 20
    y, gammas = targets(labels), np.array([1e-8, 1e-5, 1e-2])
    order = np.random.default_rng(0).permutation(60)
    for number, gamma in enumerate(gammas):
        without = [np.arange(60) != row for row in range(60)]
        again = [y[~kept] - z[~kept] @ fit(z[kept], y[kept], gamma) for kept in without]
        assert analytic.leave_one_out(z, labels, gammas=gammas).errors[number] == pytest.approx(
            np.mean(np.square(again)), rel=1e-6)
        rest = y[order[48:]] - z[order[48:]] @ fit(z[order[:48]], y[order[:48]], gamma)
        assert analytic.held_out(z, labels, gammas=gammas).errors[number] == pytest.approx(
            np.mean(np.square(rest)), rel=1e-6)


@pytest.mark.parametrize("width", [512, 61])
def test_held_out_equals_fitting_on_four_fifths_and_measuring_on_the_rest(width):
    z, y = Z[:, :width], targets(Y)
    order = np.random.default_rng(5).permutation(len(z))
    fitted, rest = order[:118], order[118:]  # int(0.8 * 148)
    gammas = np.array([gamma_of(z, relative) for relative in (1e-4, 1e-2, 1.0, 1e2)])
    expected = [np.mean((z[rest] @ fit(z[fitted], y[fitted], g) - y[rest]) ** 2) for g in gammas]
    choice = analytic.held_out(z, Y, seed=5, gammas=gammas)
    np.testing.assert_allclose(choice.errors, expected, rtol=1e-9)
    assert choice.gamma == gammas[np.argmin(expected)]
    assert not np.array_equal(analytic.held_out(z, Y, seed=6, gammas=gammas).errors, choice.errors)


def test_held_out_does_not_measure_on_the_last_classes_where_rows_come_sorted():
    rows = np.argsort(Y)
    z, labels = Z[rows], Y[rows]
    unshuffled = np.mean([label in labels[:118] for label in labels[118:]])
    assert unshuffled < 1  # the last classes would be in nothing that is fitted
    gamma = analytic.held_out(z, labels).gamma
    assert gamma / 100 <= analytic.leave_one_out(z, labels).gamma <= 100 * gamma


@pytest.mark.parametrize("choose", [analytic.leave_one_out, analytic.held_out])
def test_too_few_rows_are_one_clear_error(choose):
    with pytest.raises(ValueError, match="1 rows for choosing gamma by .*; expected 2 or more"):
        choose(Z[:1], Y[:1])


def test_share_without_rows_is_one_clear_error():
    with pytest.raises(ValueError, match="expected some rows on both sides"):
        analytic.held_out(Z, Y, share=0.0)
