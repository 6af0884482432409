"""The strength gamma of a ridge regression, chosen on training clips alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tail_jax.analytic.moments import one_hot

GAMMAS = 10.0 ** np.arange(-8, 9)


class GammaChoice(NamedTuple):
    """The best of some gammas, and the curve.

    Attributes:
        gamma: that of the least error; of equal ones the smallest.
        gammas: [k] that were tried.
        errors: [k] mean square error over rows and classes that occur.
        deviations: [k] standard errors of these means over rows.
    """

    gamma: float
    gammas: np.ndarray
    errors: np.ndarray
    deviations: np.ndarray

    @property
    def one_se(self) -> float:
        """The largest gamma whose error is within a standard error of the least.

        The one-standard-error rule (Breiman, Friedman, Olshen and Stone 1984): where the rows
        cannot tell gammas apart, the stronger one.
        """
        best = np.argmin(self.errors)
        near = self.errors <= self.errors[best] + self.deviations[best]
        return float(self.gammas[near].max())


def leave_one_out(features: np.ndarray, labels: np.ndarray, *, seed: int = 0,
                  most_rows: int = 2048, gammas: np.ndarray = GAMMAS) -> GammaChoice:
    """By the error on each clip when the ridge is fitted on the others, without refitting (PACE).

        K = Z Z^T,  e_i = [(K + gamma I)^-1 Y]_i / [(K + gamma I)^-1]_ii

    One eigendecomposition of K serves all gammas.

    Args:
        features: Z [n, M].
        labels: [n].
        seed: of the rows that are taken where there are more than `most_rows`.
        most_rows: K has its square, and its decomposition takes the cube.
        gammas: to choose from, ascending.

    Raises:
        ValueError: on fewer than 2 clips.
    """
    _check_rows(labels, 2, "leaving one out")
    if len(labels) > most_rows:
        rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:most_rows])
        features, labels = features[rows], labels[rows]
    z, (_, y) = np.asarray(features, np.float64), one_hot(labels)
    values, vectors = _eigh(z @ z.T)
    rotated, weights = vectors.T @ y, vectors**2

    def squares_of(gamma):
        left_out = vectors @ (rotated / (values + gamma)[:, None])
        return (left_out / (weights @ (1 / (values + gamma)))[:, None]) ** 2

    return _best(gammas, squares_of)


def held_out(features: np.ndarray, labels: np.ndarray, *, seed: int = 0, share: float = 0.2,
             gammas: np.ndarray = GAMMAS) -> GammaChoice:
    """By the error on a share of the clips when the ridge is fitted on the rest (RanPAC).

    Rows are shuffled by `seed` first. The decomposition that serves all gammas is that of Z Z^T or
    Z^T Z, whichever is smaller.

    Raises:
        ValueError: if the share leaves no clip to fit on, or none to measure on.
    """
    _check_rows(labels, 2, "holding out")
    z, (_, y) = np.asarray(features, np.float64), one_hot(labels)
    order = np.random.default_rng(seed).permutation(len(z))
    count = int(len(z) * (1 - share) + 1e-9)  # 0.8 of 10 rows are 8
    if not 0 < count < len(z):
        raise ValueError(f"a share of {share:g} of {len(z)} rows; expected some rows on both sides")
    fit, rest = order[:count], order[count:]
    z_fit, y_fit, tested = z[fit], y[fit], z[rest]
    if len(fit) <= z.shape[1]:
        values, vectors = _eigh(z_fit @ z_fit.T)
        rotated, tested = vectors.T @ y_fit, tested @ (z_fit.T @ vectors)
    else:
        values, vectors = _eigh(z_fit.T @ z_fit)
        rotated, tested = vectors.T @ (z_fit.T @ y_fit), tested @ vectors
    kept = values > 0  # what the others would multiply is zero but for rounding
    values, rotated, tested = values[kept], rotated[kept], tested[:, kept]

    def squares_of(gamma):
        return (tested @ (rotated / (values + gamma)[:, None]) - y[rest]) ** 2

    return _best(gammas, squares_of)


def _eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and vectors; values within rounding of zero are zero."""
    values, vectors = np.linalg.eigh(matrix)
    rounding = len(values) * np.finfo(float).eps * values[-1]
    return np.where(values > rounding, values, 0.0), vectors


def _best(gammas, squares_of) -> GammaChoice:
    """Of the squared errors [n, C] that a gamma gives."""
    rows = np.array([squares_of(gamma).mean(1) for gamma in gammas])  # [k, n]
    errors, deviations = rows.mean(1), rows.std(1) / rows.shape[1] ** 0.5
    return GammaChoice(float(gammas[np.argmin(errors)]), np.asarray(gammas), errors, deviations)


def _check_rows(labels, least: int, what: str) -> None:
    if len(labels) < least:
        raise ValueError(f"{len(labels)} rows for choosing gamma by {what}; expected {least} or "
                         "more")
