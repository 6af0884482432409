"""Ridge regression on one-hot labels that forgets nothing, on the host in float64.

With Z [n, M] the features of all clips so far, as extracted in their sessions, and Y [n, C] their
one-hot labels,

    W = argmin |Z W - Y|^2 + gamma |W|^2 = (Z^T Z + gamma I)^-1 Z^T Y

in either of two ways, which agree:

    accumulation   moments.accumulate: G += Z^T Z, Q += Z^T Y;  solve_ridge: Cholesky
    recursion      R = (G + gamma I)^-1 kept by Woodbury's identity, W corrected: start_recursion,
                   recurse. gamma cannot change on the way.

Recursion costs 3 M^2 n operations for n clips, accumulation M^2 n, and M^3 / 3 more for each solve:
`recursion_is_faster` says which is cheaper for a stream.

Rounding: features after ReLU share a large mean direction, so G is ill-conditioned, by about
1.8e3 / gamma_rel with gamma_rel = gamma M / tr G. The error of recursion is about 5e-11 at
gamma_rel 1e-2 and 2e-8 at 1e-5; accumulation also allows less.

References: PACE (arXiv 2602.03355); RanPAC (McDonnell et al., NeurIPS 2023); ACIL (Zhuang et al.,
NeurIPS 2022). gamma is `alpha` of scikit-learn's Ridge(fit_intercept=False).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
from scipy.linalg import blas

from tail_jax.analytic import moments
from tail_jax.analytic.features import random_features
from tail_jax.analytic.moments import State

# Rows at a time: recursion costs 3 M n more for each of the n rows it takes at once, and features
# of all clips of a session need not fit in memory.
ROWS = 1024


def solve_ridge(state: State, gamma: float) -> np.ndarray:
    """W [M, C] = (G + gamma I)^-1 Q of the sums of `moments.accumulate`.

    gamma may differ from call to call. Classes without clips have zeros.

    Raises:
        ValueError: if gamma is not positive, or so small that rounding makes G + gamma I
            indefinite.
    """
    _check_gamma(gamma)
    system = np.array(state["gram"], order="C")
    system.flat[::len(system) + 1] += gamma
    try:
        factor = scipy.linalg.cho_factor(system.T, lower=True, overwrite_a=True,
                                         check_finite=False)
    except np.linalg.LinAlgError:
        raise ValueError(
            f"gamma {gamma:g} is {relative_gamma(state, gamma):.1e} of the mean diagonal of the "
            "Gram matrix, too little for float64; expected 1e-12 or more, so raise gamma") from None
    return np.ascontiguousarray(scipy.linalg.cho_solve(factor, state["sums"].T,
                                                       check_finite=False))


def relative_gamma(state: State, gamma: float) -> float:
    """gamma_rel = gamma M / tr G, what conditioning depends on."""
    return gamma * len(state["gram"]) / max(np.trace(state["gram"]), np.finfo(float).tiny)


def start_recursion(classes: int, width: int, gamma: float) -> State:
    """The state of `recurse` before the first clip.

    {inverse: R [M, M], upper triangle, I / gamma; weights: W [M, C], zeros; counts [C]}. gamma is
    in it for good. Such states cannot be merged: merge sums, and solve.

    Raises:
        ValueError: if gamma is not positive.
    """
    _check_gamma(gamma)
    inverse = np.zeros((width, width))
    inverse.flat[::width + 1] = 1 / gamma
    return {"inverse": inverse, "weights": np.zeros((width, classes)), "counts": np.zeros(classes)}


def recurse(state: State, features: np.ndarray, labels: np.ndarray,
            mask: np.ndarray | None = None, *, donate: bool = False) -> State:
    """R and W with more clips, of any classes; arguments and errors as `moments.accumulate`.

        S = I + Z R Z^T = L L^T;  B = L^-1 Z R;  R -= B^T B;  W += B^T L^-1 (Y - Z W)

    by R_new Z^T = R Z^T S^-1. Only R's upper triangle is kept, so it is symmetric for ever.

    Raises:
        ValueError: also if rounding has made R indefinite (gamma too small for recursion).
    """
    weights = state["weights"]
    z, labels = moments.clean_rows(features, labels, mask, weights.shape[1], len(weights))
    state = {name: moments.own(array, donate) for name, array in state.items()}
    present, targets = moments.one_hot(labels)
    state["counts"][present] += targets.sum(0)
    y = np.zeros((len(z), weights.shape[1]))
    y[:, present] = targets
    for part in moments.parts(len(z), ROWS):
        _recurse(state, z[part], y[part])
    return state


def _recurse(state: State, z: np.ndarray, y: np.ndarray) -> None:
    """One update, in place."""
    inverse, weights = state["inverse"], state["weights"]
    gain = blas.dsymm(1.0, inverse.T, z.T, lower=1)  # R Z^T [M, n]
    system = z @ gain
    system.flat[::len(z) + 1] += 1
    try:
        root = scipy.linalg.cholesky(system, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise ValueError("rounding has made the inverse of the recursion indefinite; expected "
                         "gamma above 1e-5 of the mean diagonal of the Gram matrix, so raise "
                         "gamma, or accumulate and solve") from None
    gain = blas.dtrsm(1.0, root, gain, side=1, lower=1, trans_a=1, overwrite_b=1)  # B^T [M, n]
    residual = scipy.linalg.solve_triangular(root, y - z @ weights, lower=True, check_finite=False)
    weights += gain @ residual
    state["inverse"] = moments.add_gram(inverse, gain.T, -1.0)


def recursion_is_faster(sizes: Sequence[int], features: int, classes: int) -> bool:
    """Whether recursion takes fewer operations than accumulation and a solve each session.

    Args:
        sizes: training clips of each session.
        features: M.
        classes: C.

    With M = 8,192: yes below about 1,100 clips a session for 50 classes (TIMIT's 16 by far), no
    above.
    """
    m, c = float(features), classes
    recursion = sum(3 * m * m * n + 3 * m * n * min(n, ROWS) + 4 * m * n * c for n in sizes)
    accumulation = sum(m * m * n + 2 * m * n * c + m**3 / 3 + 2 * m * m * c for n in sizes)
    return recursion < accumulation


def ridge_scores(weights: np.ndarray, z: np.ndarray, w_p: np.ndarray, seen: np.ndarray
                 ) -> np.ndarray:
    """relu(z W_p) W [n, C] of embeddings z [n, D], -inf for classes not `seen` [C]."""
    scores = np.empty((len(z), weights.shape[1]))
    w_p = np.asarray(w_p, np.float64)
    for part in moments.parts(len(z), ROWS):
        scores[part] = random_features(z[part], w_p) @ weights
    return moments.only_seen(scores, seen)


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma < np.inf:
        raise ValueError(f"gamma is {gamma:g}; expected a positive number")
