"""The boundary-aware perturbation loss of PACE (Li, Zhou and Wang, ICLR 2026, section 3.4 here).

Each training clip x_i of class c has N_p masked copies; S_i is the clip and its copies. A clip is
boundary-prone if more than the share rho_p of its copies is classified wrongly when the session
starts; the wrong copies of these clips are the boundary set B (ours: the copies, not the clips).

    L_reg(i) = max(0, delta + mean_{u in S_i} ||f(u) - mu_c||^2 - min_{b in B} ||f(x_i) - b||^2)

so a clip's copies gather around the mean mu_c of its class, and the clip keeps away from the
boundary. N_p = 20, rho_p = 0.3, delta = 0.25 (paper). Ours: features f have unit length (delta says
nothing about squared distances near d), mu and B carry no gradient, a clip's own copies are left
out of its minimum, an empty B gives 0; a copy has one time band and one frequency band, of widths
U(0.1, 0.3) of the axis, set to what normalisation turns into 0; the classifier that judges copies
is a ridge on the features of the session's clean clips.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_PRECISE = jax.lax.Precision.HIGHEST


def masked_copy(audio: jax.Array, clip_id: jax.Array, copy: jax.Array, key: jax.Array,
                fill: jax.Array | float = 0.0,
                widths: tuple[float, float] = (0.1, 0.3)) -> jax.Array:
    """Copy number `copy` of each clip, one time and one frequency band set to `fill`.

    The bands are a function of key, clip_id and copy alone: a clip has the same copies in every
    batch and epoch. (`data_pipelines.augment` draws a new mask for each epoch, on the host.)

    Args:
        audio: [B, frames, mels].
        clip_id: int32 [B].
        copy: int32 scalar, or [B] with a number for each row.
        key: of the session.
        fill: value that the tower's normalisation turns into 0, its input mean.
        widths: least and largest share of an axis; a band has at least one frame or mel.
    """

    def numbers(clip, copy):
        own = jax.random.fold_in(jax.random.fold_in(key, clip), copy)
        return jax.random.uniform(own, (2, 2))  # (time, frequency) x (width, start)

    drawn = jax.vmap(numbers)(clip_id, jnp.broadcast_to(copy, clip_id.shape))

    def band(numbers, length):
        share = widths[0] + (widths[1] - widths[0]) * numbers[:, 0]
        width = jnp.clip(jnp.round(share * length), 1, length).astype(jnp.int32)
        start = (numbers[:, 1] * (length - width + 1)).astype(jnp.int32)
        place = jnp.arange(length) - start[:, None]
        return (place >= 0) & (place < width[:, None])

    time, mels = band(drawn[:, 0], audio.shape[1]), band(drawn[:, 1], audio.shape[2])
    return jnp.where(time[:, :, None] | mels[:, None, :], jnp.asarray(fill, audio.dtype), audio)


def ridge_predictions(features: np.ndarray, labels: np.ndarray, others: np.ndarray,
                      ridge: float) -> np.ndarray:
    """Labels of `others` [m, d] by a ridge classifier fitted on features [n, d], float64.

    Targets are one-hot over the labels that occur. Features and targets are centred, that is, the
    intercept is not penalised: unit features of one corpus share a large mean. The penalty is
    `ridge` times the mean squared length of the centred features (1e-2 by default in PACE: ours).
    """
    classes, targets = np.unique(labels, return_inverse=True)
    features, others = np.asarray(features, np.float64), np.asarray(others, np.float64)
    one_hot = np.eye(len(classes))[targets]
    mean, level = features.mean(0), one_hot.mean(0)
    x, y = features - mean, one_hot - level
    penalty = ridge * np.square(x).sum(1).mean() + np.finfo(np.float64).tiny
    if len(x) <= x.shape[1]:  # the smaller of the two systems
        weights = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
    else:
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    return classes[((others - mean) @ weights + level).argmax(-1)]


def boundary_copies(features: np.ndarray, labels: np.ndarray, copies: np.ndarray,
                    wrong_share: float = 0.3, ridge: float = 1e-2) -> np.ndarray:
    """bool [n, N_p]: the wrong copies of boundary-prone clips.

    Args:
        features: [n, d], of the clean clips.
        labels: [n].
        copies: [n, N_p, d], features of the copies.
        wrong_share: a clip is boundary-prone above this share of wrong copies.
        ridge: see `ridge_predictions`.
    """
    n, count, width = copies.shape
    predicted = ridge_predictions(features, labels, copies.reshape(-1, width), ridge)
    wrong = predicted.reshape(n, count) != np.asarray(labels)[:, None]
    return wrong & (wrong.mean(1, keepdims=True) > wrong_share)


def empty_set(room: int, classes: int, width: int) -> dict[str, jax.Array]:
    """The arrays of a session's boundary without any entry; every session has their shapes.

    Returns:
        {features [K, d] and clip [K] of the entries, present bool [K], means [C, d] of the classes
        of the session, key uint32 [2] of the masks, active: whether the loss counts}.
    """
    return {"features": jnp.zeros((room, width)), "clip": jnp.zeros(room, jnp.int32),
            "copy": jnp.zeros(room, jnp.int32), "present": jnp.zeros(room, bool),
            "means": jnp.zeros((classes, width)), "key": jnp.zeros(2, jnp.uint32),
            "active": jnp.zeros((), bool)}


def chosen_set(empty: dict, wrong: np.ndarray, seed: int) -> dict[str, jax.Array]:
    """The set of these copies, bool [n, N_p], without features; of too many a random choice."""
    pairs, room = np.argwhere(wrong), len(empty["present"])
    if len(pairs) > room:
        chosen = np.random.default_rng(seed).permutation(len(pairs))[:room]
        pairs = pairs[np.sort(chosen)]
    pairs = np.pad(pairs.astype(np.int32), ((0, room - len(pairs)), (0, 0)))
    return empty | {"clip": jnp.asarray(pairs[:, 0]), "copy": jnp.asarray(pairs[:, 1]),
                    "present": jnp.arange(room) < min(int(wrong.sum()), room)}


def encoded_set(found: dict, features: np.ndarray, copies: np.ndarray,
                labels: np.ndarray) -> dict[str, jax.Array]:
    """The set with features of the current model.

    Args:
        found: of `chosen_set`.
        features: [n, d], of the clean clips.
        copies: [n, N_p, d].
        labels: [n] numbers of classes.
    """
    means = np.zeros(found["means"].shape, np.float32)
    for c in np.unique(labels):
        means[c] = features[labels == c].mean(0)
    entries = copies[np.asarray(found["clip"]), np.asarray(found["copy"])]
    entries = np.where(np.asarray(found["present"])[:, None], entries, 0)
    return found | {"features": jnp.asarray(entries, jnp.float32), "means": jnp.asarray(means)}


def boundary_loss(clean: jax.Array, copies: jax.Array, means: jax.Array, boundary: jax.Array,
                  others: jax.Array, margin: float, of: int) -> jax.Array:
    """L_reg of each row, [B].

    The mean over S_i is (||f(x_i) - mu||^2 + N_p m) / (1 + N_p), m the mean over the copies given:
    exact with all N_p copies, without bias with a random choice of them.

    Args:
        clean: f(x_i), unit rows [B, d].
        copies: f of some or all of a clip's copies, [B, R, d].
        means: mu of the class of each row, [B, d].
        boundary: B, [K, d].
        others: bool [B, K], False on entries of B that are not there or are the row's own copies.
        margin: delta.
        of: N_p.
    """
    means, boundary = jax.lax.stop_gradient((means, boundary))
    squared = lambda x, y: jnp.square(x - y).sum(-1)
    near = (squared(clean, means) + of * squared(copies, means[:, None]).mean(1)) / (1 + of)
    # The nearest entry by products, which need no [B, K, d]; its distance by differences, which
    # have the right gradient where the two meet.
    products = jnp.matmul(jax.lax.stop_gradient(clean), boundary.T, precision=_PRECISE)
    far = jnp.where(others, jnp.square(boundary).sum(-1) - 2 * products, jnp.inf)
    far = squared(clean, boundary[far.argmin(-1)])
    return jnp.where(others.any(-1), jnp.maximum(0.0, margin + near - far), 0.0)
