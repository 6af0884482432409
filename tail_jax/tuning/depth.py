"""How much of a tower to tune: which blocks, by how far tuning moved them; in how many sessions.

PACE (Li, Zhou and Wang, ICLR 2026). A tower is tuned on the first session once on trial; s_l is the
similarity of the outputs of block l before and after. Blocks below L_tune are then left alone:

    L_tune = first l with s_l < rho_layer                 (paper); L if there is none (ours)
    T_3    = min{ t : N_1 + ... + N_t > N_stop }          (paper); T if there is none (ours)

The similarity is linear CKA (Kornblith et al., ICML 2019), X and Y with centred columns:

    CKA = ||X^T Y||_F^2 / ( ||X^T X||_F ||Y^T Y||_F )

It does not change when X is rotated, scaled or moved. Which rows the paper takes is not known. Ours
is every token of every clip, from moments that are merged batch by batch. One row a clip is wrong
for small sessions: two independent Gaussian sets of 16 rows with 768 columns have a plain CKA of
0.97. `debiased_cka` takes the bias out, at the price of noise: the estimate of Song et al. (JMLR
2012) without the diagonals, K = X X^T, L = Y Y^T, both with zeros on the diagonal, n rows:

    h(K, L) = [ tr(K L) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 (1'K L1) / (n-2) ] / (n (n-3))
    CKA     = h(K, L) / sqrt(h(K, K) h(L, L))
"""

from __future__ import annotations

from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_PRECISE = jax.lax.Precision.HIGHEST


def token_moments(x: Sequence[jax.Array], y: Sequence[jax.Array], mask: jax.Array) -> dict:
    """Moments of paired tokens of one batch about their own mean, for each of L blocks, float32.

    Centred within the batch: of raw sums, those of features with a large mean, float32 would lose
    the digits that centring needs.

    Args:
        x, y: L arrays [B, S, d] each.
        mask: bool [B], False on padding rows, which enter nothing.

    Returns:
        {rows [], x [L, d], y [L, d] the means, xx, yy, xy [L, d, d] the scatters}.
    """
    rows = mask.sum().astype(jnp.float32) * x[0].shape[1]

    def centred(z):
        z = jnp.where(mask[:, None, None], z, 0).astype(jnp.float32)
        mean = z.sum((0, 1)) / jnp.maximum(rows, 1)
        return mean, jnp.where(mask[:, None, None], z - mean, 0)

    def block(x, y):
        (mean_x, x), (mean_y, y) = centred(x), centred(y)
        product = lambda u, v: jnp.einsum("bsi,bsj->ij", u, v, precision=_PRECISE)
        return {"x": mean_x, "y": mean_y, "xx": product(x, x), "yy": product(y, y),
                "xy": product(x, y)}

    blocks = [block(*pair) for pair in zip(x, y)]
    return {"rows": rows} | jax.tree.map(lambda *parts: jnp.stack(parts), *blocks)


def merge_moments(total: dict | None, part: dict) -> dict:
    """The moments of both sets of rows together, NumPy float64; None is no rows yet.

        S = S_1 + S_2 + n_1 n_2 / (n_1 + n_2) (m_1 - m_2)^T (m_1 - m_2)

    (Chan, Golub and LeVeque 1983).
    """
    part = {name: np.asarray(value, np.float64) for name, value in part.items()}
    if total is None or not total["rows"]:
        return part
    if not part["rows"]:
        return total
    rows = total["rows"] + part["rows"]
    share = part["rows"] / rows
    shift = {name: part[name] - total[name] for name in "xy"}
    merged = {name: total[name] + share * shift[name] for name in "xy"}
    for name in ("xx", "yy", "xy"):
        outer = shift[name[0]][..., :, None] * shift[name[1]][..., None, :]
        merged[name] = total[name] + part[name] + total["rows"] * share * outer
    return merged | {"rows": rows}


def token_cka(moments: dict) -> np.ndarray:
    """Linear CKA of each block, [L], from moments; 1 where neither side varies at all."""
    norm = lambda m: np.sqrt(np.square(m).sum((-2, -1)))
    below = norm(moments["xx"]) * norm(moments["yy"])
    constant = (norm(moments["xx"]) == 0) & (norm(moments["yy"]) == 0)
    return np.where(constant, 1.0, norm(moments["xy"]) ** 2 / np.maximum(below, 1e-300))


def debiased_cka(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Debiased linear CKA of each block, [L], from one row a clip: x, y [n, L, d].

    Raises:
        ValueError: for fewer than 4 rows, for which the estimate is not defined.
    """
    n = len(x)
    if n < 4:
        raise ValueError(f"the session has {n} clips; debiased CKA needs 4 or more: take "
                         "method.cka=tokens")

    def grams(z):
        z = np.asarray(z, np.float64).swapaxes(0, 1)  # [L, n, d]
        k = z @ z.swapaxes(1, 2)
        k[:, range(n), range(n)] = 0
        return k

    def h(k, l):
        sums = k.sum(-1), l.sum(-1)  # [L, n]
        total = (k * l).sum((1, 2)) + sums[0].sum(1) * sums[1].sum(1) / ((n - 1) * (n - 2))
        return (total - 2 * (sums[0] * sums[1]).sum(1) / (n - 2)) / (n * (n - 3))

    k, l = grams(x), grams(y)
    below = np.sqrt(np.maximum(h(k, k) * h(l, l), 0))
    return h(k, l) / np.maximum(below, 1e-300)


def first_below(similarities: Sequence[float], threshold: float) -> int:
    """The number, from 1, of the first block whose similarity is below; the last if none is."""
    below = np.flatnonzero(np.asarray(similarities) < threshold)
    return int(below[0]) + 1 if len(below) else len(similarities)


def still_tunes(seen: float, limit: float) -> bool:
    """Whether a session tunes that begins after `seen` training clips: up to T_3, they do.

    N_1 + ... + N_t first exceeds the limit at T_3, so what is seen before a session does not exceed
    it at T_3, and does from T_3 + 1 on.
    """
    return seen <= limit


def last_tuned_session(sizes: Sequence[int], limit: float) -> int:
    """T_3, from 1, of sessions of these numbers of training clips."""
    return sum(still_tunes(sum(sizes[:t]), limit) for t in range(len(sizes)))
