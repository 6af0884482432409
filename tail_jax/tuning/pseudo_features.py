"""Pseudo-features: draws from what is kept of each class's features when its clips are gone.

Of each class c there are K centroids m_ck of K-means, a diagonal variance v_ck of the features
nearest to each, and the share s_ck of the class's clips that these are (HiDe-Prompt, Wang et al.,
NeurIPS 2023, keeps such centroids; a variance for each of them and shares are ours). A draw is

    c uniform over classes,   k with probability s_ck,   x = m_ck + sqrt(v_ck + floor) eps,

eps ~ N(0, I). The floor lets classes with hardly more clips than centroids scatter at all (ours).

Statistics are host arrays {mean [C, K, d], variance [C, K, d], share [C, K]}, float32; classes
without clips have zeros. `fit` trains a small classifier on draws in one compiled program, whatever
the number of classes and steps.
"""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax import losses
from tail_jax.tuning import pools

FLOOR = 1e-4  # of a variance


def no_statistics(classes: int, centroids: int, width: int) -> dict:
    """Statistics of no class."""
    empty = lambda *shape: np.zeros((classes, centroids, *shape), np.float32)
    return {"mean": empty(width), "variance": empty(width), "share": empty()}


def add_classes(statistics: dict, features: np.ndarray, labels: np.ndarray, seed: int) -> dict:
    """The statistics with those of the classes of features [n, d], labels [n]; the rest stays."""
    statistics = {name: np.array(x) for name, x in statistics.items()}
    centroids = statistics["share"].shape[1]
    for c in np.unique(labels):
        own = np.asarray(features[labels == c], np.float64)
        centres = pools.centroids(own, min(centroids, len(own)), seed + int(c))
        nearest = pools.squared_distances(own, centres).argmin(1)
        for name in statistics:
            statistics[name][c] = 0
        for k in np.unique(nearest):
            part = own[nearest == k]
            statistics["mean"][c, k] = part.mean(0)
            statistics["variance"][c, k] = part.var(0)
            statistics["share"][c, k] = len(part) / len(own)
    return statistics


def class_means(statistics: dict) -> np.ndarray:
    """Mean feature of each class, [C, d]."""
    return np.einsum("ck,ckd->cd", statistics["share"], statistics["mean"])


def draw(key: jax.Array, statistics: dict, present: jax.Array, count: int):
    """(features [count, d], classes int [count]) drawn from the classes where `present` [C]."""
    keys = jax.random.split(key, 3)
    log = lambda p: jnp.where(p > 0, jnp.log(jnp.maximum(p, 1e-30)), -jnp.inf)
    c = jax.random.categorical(keys[0], jnp.where(present, 0.0, -jnp.inf), shape=(count,))
    k = jax.random.categorical(keys[1], log(statistics["share"][c]))
    deviation = jnp.sqrt(statistics["variance"][c, k] + FLOOR)
    noise = jax.random.normal(keys[2], deviation.shape)
    return statistics["mean"][c, k] + deviation * noise, c


@functools.partial(jax.jit, static_argnames=("apply", "batch"))
def fit(apply: Callable, parameters, statistics: dict, present, targets, outputs, key, steps, rate,
        momentum, *, batch: int):
    """The parameters after SGD on pseudo-features, with a cosine from `rate` to 0.

        v <- momentum v + gradient,  p <- p - rate (1 + cos(pi i / steps)) / 2 v

    Args:
        apply: (parameters, features [n, d]) -> scores [n, K]; a function of a module, so that it
            is compiled once.
        parameters: a tree of arrays.
        statistics: of the classes.
        present: bool [C], the classes that are drawn.
        targets: int [C], which of the K outputs each class should have.
        outputs: bool [K], among which outputs the cross-entropy is.
        key: of all draws.
        steps: their number, an array.
        batch: draws a step.
    """
    def loss(parameters, features, wanted):
        return losses.classification_loss(apply(parameters, features), wanted, outputs,
                                          jnp.ones(batch, bool))

    def step(i, carry):
        parameters, velocity = carry
        features, c = draw(jax.random.fold_in(key, i), statistics, present, batch)
        gradient = jax.grad(loss)(parameters, features, targets[c])
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient)
        factor = rate * (1 + jnp.cos(jnp.pi * i / jnp.maximum(steps, 1))) / 2
        return jax.tree.map(lambda p, v: p - factor * v, parameters, velocity), velocity

    start = parameters, jax.tree.map(jnp.zeros_like, parameters)
    return jax.lax.fori_loop(0, steps, step, start)[0]


def init_mlp(key: jax.Array, width: int, outputs: int) -> dict:
    """A network of one hidden layer as wide as its input, LeCun normal; zeros at the output."""
    return {"hidden": {"kernel": jax.random.normal(key, (width, width)) * width**-0.5,
                       "bias": jnp.zeros(width)},
            "output": {"kernel": jnp.zeros((width, outputs)), "bias": jnp.zeros(outputs)}}


def linear(parameters: dict, x: jax.Array) -> jax.Array:
    """x W + b, in float32 on every device."""
    product = jnp.matmul(x, parameters["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + parameters["bias"]


def mlp(parameters: dict, x: jax.Array) -> jax.Array:
    """linear(relu(linear(x)))."""
    return linear(parameters["output"], jax.nn.relu(linear(parameters["hidden"], x)))
