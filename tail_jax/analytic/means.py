"""Classifiers from class means, and covariances about them; all from `moments`, in float64.

Scores are [n, C], the larger the better, -inf for classes without clips.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from tail_jax.analytic import moments
from tail_jax.analytic.moments import State


def cosine_scores(state: State, z: np.ndarray) -> np.ndarray:
    """cos(z, mu_c): the nearest class mean (NCM, SimpleCIL, APER's prototypes)."""
    return moments.only_seen(_unit(z) @ _unit(moments.class_means(state)).T, state["counts"] > 0)


def linear_discriminant(state: State, shrinkage: float = 1e-4) -> tuple[np.ndarray, np.ndarray]:
    """(weight [C, D], bias [C]) of the linear discriminant with a shared covariance, equal priors.

        S = (sum z^T z - sum_c n_c mu_c^T mu_c) / n,  S_e = S + shrinkage tr(S) / D I
        score_c = z S_e^-1 mu_c^T - mu_c S_e^-1 mu_c^T / 2

    Log-posteriors up to a constant where classes are Gaussian with covariance S_e. `state` has the
    gram (second="shared"); unseen classes have zeros.

    Raises:
        ValueError: if rounding leaves no positive covariance (features that hardly vary).
    """
    mean, counts = moments.class_means(state), state["counts"]
    scatter = moments.symmetric(state["gram"]) - (mean * counts[:, None]).T @ mean
    return discriminant(mean, scatter / max(counts.sum(), 1), shrinkage)


def discriminant(mean: np.ndarray, covariance: np.ndarray, shrinkage: float
                 ) -> tuple[np.ndarray, np.ndarray]:
    """The same of means [C, D] and a covariance S [D, D]."""
    width = len(covariance)
    system = covariance + shrinkage * np.trace(covariance) / width * np.eye(width)
    try:
        factor = scipy.linalg.cho_factor(system, overwrite_a=True)
    except np.linalg.LinAlgError:
        raise ValueError(
            f"the covariance, with {shrinkage:g} of its mean diagonal added, is not positive "
            "definite; expected features that vary within classes, or more shrinkage") from None
    weight = scipy.linalg.cho_solve(factor, mean.T).T
    return weight, -(weight * mean).sum(1) / 2


def linear_discriminant_scores(weight: np.ndarray, bias: np.ndarray, z: np.ndarray,
                               seen: np.ndarray) -> np.ndarray:
    """z weight^T + bias, of `linear_discriminant`; `seen` [C] are the classes with clips."""
    return moments.only_seen(np.asarray(z, np.float64) @ weight.T + bias, seen)


def fecam_scores(state: State, z: np.ndarray, added: float = 100.0) -> np.ndarray:
    """Minus the Mahalanobis distance of unit vectors, with a correlation matrix of each class.

        A_c = Sigma_c + added I,  P_c = A_c / (d d^T) with d = sqrt(diag A_c)
        score_c = -(u - v_c) P_c^-1 (u - v_c)^T,  u = z / |z|,  v_c = mu_c / |mu_c|

    Sigma_c is the unbiased covariance of z itself (zeros for a class of one clip). `state` has the
    grams (second="class").

    Reference: FeCAM (Goswami et al., NeurIPS 2023).
    """
    mean, counts, unit = moments.class_means(state), state["counts"], _unit(z)
    scores = np.full((len(unit), len(counts)), -np.inf)
    for c in np.flatnonzero(counts):
        scatter = state["grams"][c] - counts[c] * np.outer(mean[c], mean[c])
        matrix = scatter / max(counts[c] - 1, 1) + added * np.eye(len(scatter))
        deviation = np.sqrt(np.diag(matrix))
        root = np.linalg.cholesky(matrix / np.outer(deviation, deviation))
        scaled = scipy.linalg.solve_triangular(root, (unit - _unit(mean[c])).T, lower=True)
        scores[:, c] = -(scaled**2).sum(0)
    return scores


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(float).tiny)
