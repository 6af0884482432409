"""Which task does an item look like? Linear routers from sums over each task's training data.

A frozen tower hides the domain more and more with depth: its embedding was trained to. The domain
shows at the entrance: in the statistics of the first blocks' tokens (channel, background, level),
and in the choice of words. Both routers are closed forms of sums that are kept when the data is
gone, so that a new task changes none of the old statistics:

    audio   linear discriminant analysis    s_m = mu_m^T S^-1 f - mu_m^T S^-1 mu_m / 2
            f = mean and deviation over tokens of the first two hidden layers, S pooled within tasks
    text    multinomial naive Bayes         s_m = sum over tokens w of log p(w | m)

Scores are log-posteriors up to a constant (equal priors). Items are judged one by one, audio
without its text and text without its audio.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.analytic.means import discriminant as discriminant_of

LAYERS = 2        # hidden layers that audio features are made of
SHRINKAGE = 1e-3  # share of the mean variance added to the covariance's diagonal
PSEUDO_COUNT = 0.5


def audio_features(model, frozen: dict, batch: dict) -> jax.Array:
    """Mean and standard deviation over tokens of the first hidden layers: [B, D] float32."""
    hidden = model.encode("audio", frozen, None, batch)["hidden"][:LAYERS]
    hidden = [x.astype(jnp.float32) for x in hidden]
    parts = [part for x in hidden for part in (x.mean(1), x.std(1))]
    return jax.lax.stop_gradient(jnp.concatenate(parts, -1))


def final_features(side: str, model, frozen: dict, batch: dict) -> jax.Array:
    """The frozen tower's embedding [B, d], where the domain is hidden best."""
    return jax.lax.stop_gradient(model.encode(side, frozen, None, batch)["embedding"])


def empty_statistics(tasks: int, width: int) -> dict:
    """Sums over no data: {mean [M, D], scatter [D, D], count [M]}, float32."""
    return {"mean": jnp.zeros((tasks, width)), "scatter": jnp.zeros((width, width)),
            "count": jnp.zeros(tasks)}


def add_task(statistics: dict, task: int, features: np.ndarray) -> dict:
    """The statistics with the features [n, D] of one more task."""
    mean, scatter, count = (np.array(statistics[name], np.float64)
                            for name in ("mean", "scatter", "count"))
    features = np.asarray(features, np.float64)
    mean[task], count[task] = features.mean(0), len(features)
    centred = features - mean[task]
    scatter += centred.T @ centred
    return {name: jnp.asarray(value, jnp.float32)
            for name, value in (("mean", mean), ("scatter", scatter), ("count", count))}


def discriminant(statistics: dict) -> dict:
    """{weight [M, D], bias [M]} of the linear discriminant; tasks without data have zeros."""
    mean, scatter, count = (np.array(statistics[name], np.float64)
                            for name in ("mean", "scatter", "count"))
    weight, bias = discriminant_of(mean, scatter / count.sum(), SHRINKAGE)
    return {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def word_log_probabilities(token_ids: np.ndarray, mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """log p(w) [V] of the tokens [n, N] where `mask` is set, with pseudo-counts."""
    counts = np.bincount(np.asarray(token_ids)[mask], minlength=vocab_size) + PSEUDO_COUNT
    return np.log(counts / counts.sum())


def linear_scores(router: dict, features: jax.Array) -> jax.Array:
    """Scores [B, M] of features [B, D]."""
    product = jnp.matmul(features, router["weight"].T, precision=jax.lax.Precision.HIGHEST)
    return product + router["bias"]


def word_scores(router: dict, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Scores [B, M] of token ids [B, N]: `linear_scores` of their counts."""
    words = router["weight"].T[token_ids]  # [B, N, M]
    return jnp.where(mask[..., None], words, 0).sum(1) + router["bias"]


def posterior(scores: jax.Array, seen: jax.Array, hard: bool) -> jax.Array:
    """Weights [B, M] over tasks: softmax of the scores of those seen, or all on the best."""
    scores = jnp.where(seen, scores, -jnp.inf)
    if hard:
        return jax.nn.one_hot(scores.argmax(-1), scores.shape[-1])
    return jax.nn.softmax(scores)
