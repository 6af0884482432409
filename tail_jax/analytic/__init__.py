"""Classifiers in closed form, for streams of classes: pure functions, states are dicts of arrays.

    moments    what is kept of the training data: counts, class sums, second moments
    features   random features relu(z W_p)
    ridge      ridge regression on one-hot labels: accumulated, or by recursion; float64 on the host
    gamma      the strength of the ridge: leave-one-out, or held-out rows
    device     the same accumulation on accelerators, float32, a part on each
    means      nearest class mean, linear discriminant, FeCAM

All give what the same data at once would give, in whatever sessions, batches and order it came, and
never choose a class of which there was no clip. Features are those of the session that gave them:
nothing here goes back to old data.

    w_p, state = projection(seed, D, M), empty_moments(C, M)
    for z, labels in sessions:                                             # z [n, D]
        gamma = gamma or leave_one_out(random_features(z, w_p), labels).gamma
        state = accumulate(state, random_features(z, w_p), labels, donate=True)
        weights = solve_ridge(state, gamma)
        scores = ridge_scores(weights, test_z, w_p, state["counts"] > 0)   # [tests, C]
"""

from tail_jax.analytic.features import projection, random_features
from tail_jax.analytic.gamma import GAMMAS, GammaChoice, held_out, leave_one_out
from tail_jax.analytic.means import (
    cosine_scores, fecam_scores, linear_discriminant, linear_discriminant_scores)
from tail_jax.analytic.moments import accumulate, empty_moments, merge, only_seen
from tail_jax.analytic.ridge import (
    recurse, recursion_is_faster, relative_gamma, ridge_scores, solve_ridge, start_recursion)

__all__ = [
    "GAMMAS", "GammaChoice", "accumulate", "cosine_scores", "empty_moments", "fecam_scores",
    "held_out", "leave_one_out", "linear_discriminant", "linear_discriminant_scores", "merge",
    "only_seen", "projection", "random_features", "recurse", "recursion_is_faster",
    "relative_gamma", "ridge_scores", "solve_ridge", "start_recursion"]
