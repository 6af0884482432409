"""The classifier of methods that learn it in closed form: ridge regression on random features.

    z_hat = relu(z W_p),   W = (G + gamma I)^-1 Q  over all clips as extracted in their sessions

kept in a method's `statistics` (host, NumPy) and read by its `decide`. Either the inverse itself is
kept and corrected by recursion (PACE, ACIL: cheap for small sessions), or G and Q are, and solved
after each session (`analytic/ridge.py` says which is cheaper). Both give the same W.

W_p, relu and the choice of gamma are ours where the literature gives none: W_p is N(0, 1); gamma is
the largest power of ten in 1e-8 .. 1e8 whose leave-one-out error on the first session is within a
standard error of the least, then fixed, for the recursion cannot change it. The few clips and
classes of a first session often cannot tell small gammas apart, and the classes to come need more:
with two classes of ESC-10 in a session, frozen features and the least error, gamma was 0.1 and
accuracy on the validation clips of all ten 50 %; with this rule it was 10^4 and 69 %, where 10^3,
the best in hindsight, had 70 % (seed 0 of configs/pace.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tail_jax import analytic

Statistics = dict[str, np.ndarray]

# Entries that `scores` reads.
DECISION = ("projection", "weights", "counts")

# Least share of the Gram matrix's mean diagonal that gamma is chosen from. The Gram matrix grows
# with the sessions, by the 315 of the longest stream to 3e-8 of it, where float64 recursion still
# has six digits; below, rounding would make it indefinite in the middle of a stream (ours).
LEAST_RELATIVE_GAMMA = 1e-5
# The same of what a chooser gives, which is solved with once: below, float64 has no Cholesky factor
# of some Gram matrices (ours; at 4e-13 that of 60 speakers and digits failed).
LEAST_SOLVABLE_GAMMA = 1e-11


def empty(classes: int, width: int, features: int, recursion: bool) -> Statistics:
    """The statistics before the first session, of the shapes that all later ones have."""
    head = {"counts": np.zeros(classes), "weights": np.zeros((features, classes)),
            "gamma": np.zeros(()), "projection": np.zeros((width, features), np.float32)}
    square = np.zeros((features, features))
    return head | ({"inverse": square} if recursion else
                   {"gram": square, "sums": np.zeros((classes, features))})


def learn(head: Statistics, z: np.ndarray, labels: np.ndarray, seed: int, gamma: float = 0.0,
          kind: str = "normal", chooser=None, one_se: bool = True) -> Statistics:
    """The statistics with the clips of one more session.

    Args:
        head: of `empty`, or of the session before; its arrays may be overwritten.
        z: features of the session's clips, [n, d].
        labels: [n] numbers of classes.
        seed: of W_p and of leave-one-out; read in the first session alone.
        gamma: 0 chooses it on the first session.
        kind: of `analytic.projection`.
        chooser: (random features, labels) of the session -> gamma, or None to keep the last; in
            every session, where G and Q are kept (RanPAC). It is raised where G is too large for
            it.
        one_se: False takes the gamma of the least error.
    """
    first = not head["counts"].any()
    if first:
        head = head | {"projection": analytic.projection(seed, *head["projection"].shape, kind)}
    rows = analytic.random_features(z, head["projection"])
    if chooser is not None:
        gamma = chooser(rows, labels) or float(head["gamma"])
        head = head | {"gamma": np.asarray(gamma or analytic.GAMMAS[-1], np.float64)}
    elif first:
        gamma = np.asarray(gamma or choose_gamma(rows, labels, seed, one_se), np.float64)
        head = head | {"gamma": gamma}
        if "inverse" in head:
            head = head | analytic.start_recursion(*head["weights"].shape[::-1], float(gamma))
    own = {name: head[name] for name in head if name not in ("projection", "gamma")}
    if "inverse" in own:
        return head | analytic.recurse(own, rows, labels, donate=True)
    del own["weights"]  # solved anew
    own = analytic.accumulate(own, rows, labels, donate=True)
    gamma = float(head["gamma"])
    if chooser is not None:
        gamma = max(gamma, LEAST_SOLVABLE_GAMMA * np.trace(own["gram"]) / len(own["gram"]))
    return head | own | {"weights": analytic.solve_ridge(own, gamma)}


def choose_gamma(rows: np.ndarray, labels: np.ndarray, seed: int, one_se: bool) -> float:
    """A power of ten by the leave-one-out error, of those that the solver can bear."""
    level = np.square(rows).sum() / rows.shape[1]  # tr G / M
    bearable = analytic.GAMMAS[analytic.GAMMAS >= LEAST_RELATIVE_GAMMA * level]
    choice = analytic.leave_one_out(rows, labels, seed=seed, gammas=bearable)
    return choice.one_se if one_se else choice.gamma


def scores(statistics: dict[str, Any], z: np.ndarray) -> np.ndarray:
    """relu(z W_p) W [n, C] of features z [n, d]; -inf for classes without clips."""
    projection, weights, counts = (np.asarray(statistics[name]) for name in DECISION)
    return analytic.ridge_scores(weights, z, projection, counts > 0)
