"""Random features: relu(z W_p), a fixed layer that makes classes easier to part by a plane."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("normal", "uniform")


def projection(seed: int, width: int, features: int, kind: str = "normal") -> np.ndarray:
    """W_p [D, M] float32, the same for the same seed.

    Args:
        seed: of the draw.
        width: D, of the embedding.
        features: M, of the random features.
        kind: "normal" is N(0, 1) (RanPAC; PACE here), "uniform" U(+-1 / sqrt D) (ACIL).

    Raises:
        ValueError: on another kind.
    """
    random = np.random.default_rng(seed)
    if kind == "normal":
        return random.standard_normal((width, features), np.float32)
    if kind == "uniform":
        return (2 * random.random((width, features), np.float32) - 1) / width**0.5
    raise ValueError(f"projection {kind!r}; expected one of {', '.join(KINDS)}")


def random_features(z, w_p, mask=None):
    """relu(z W_p) [n, M] of embeddings z [n, D]; rows where `mask` [n] is False are zero.

    JAX arrays stay on their devices (float32, precision "highest": TPUs and GPUs would round the
    factors, and ridge regression amplifies that); anything else is computed by NumPy in float64.
    """
    if isinstance(z, jax.Array):
        product = jnp.matmul(z.astype(jnp.float32), w_p, precision=jax.lax.Precision.HIGHEST)
        out = jax.nn.relu(product)
        return out if mask is None else jnp.where(mask[:, None], out, 0)
    out = np.asarray(z, np.float64) @ np.asarray(w_p, np.float64)
    np.maximum(out, 0, out=out)
    if mask is not None:
        out[~np.asarray(mask, bool)] = 0
    return out
