"""LoRASub / DRS: a LoRA a session in a drift-resistant space, classes by their nearest mean.

PACE builds on it. From session 2 on LoRA's updates stay in the subspace of the session's inputs in
the model that has unlearned all earlier sessions (`session_lora.py`, `tuning/subspaces.py`); its
code projects both factors and divides P by its Frobenius norm. The loss is

    L = CE over the session's classes + lambda L_tri                                       (lit)
    L_tri = 1/B sum_i max(0, m + max_{j: y_j = y_i} |f_i - f_j|
                                - min( min_{j: y_j != y_i} |f_i - f_j|, min_{old c} |f_i - p_c| ))

with f the unit features of a batch and p_c the unit mean of an old class c. The classifier that
the cross-entropy trains is not used afterwards: a clip has the class of the mean with the largest
cosine, which is the nearest in Euclidean distance of unit vectors. Means are those of the session
that brought the class; they are not corrected for drift.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax import analytic
from tail_jax.methods.session_lora import ConfinedLora

_PRECISE = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class LoRASub(ConfinedLora):
    """LoRASub; `aux` has `prototypes` [C, d] besides, unit means of old classes, else zeros.

    The optimizer is the run's, in the literature Adam with rate 5e-4 for LoRA; that of the
    classifier is ours.

    Attributes:
        project_sides, scale_projection: as its code (lit).
        triplet_weight, margin: lambda and m (0.05, 1: lit).
    """

    project_sides: str = "both"
    scale_projection: bool = True
    triplet_weight: float = 0.05
    margin: float = 1.0

    decision = ("counts", "sums")

    def init(self, key, model, params):
        state = super().init(key, model, params)
        aux = state["aux"] | {"prototypes": jnp.zeros((model.classes, model.embedding))}
        return state | {"aux": aux, "statistics": analytic.empty_moments(
            model.classes, model.embedding, "none")}

    def begin_task(self, state, task, data):
        if not task:
            return state
        updates, start = self._projectors(state, data)
        lora = self._start(data.key, data.model, start)["lora"]
        sums = np.asarray(state["statistics"]["sums"])  # of the direction of the means
        prototypes = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        return state | {
            "trainable": state["trainable"] | {"lora": lora},
            "aux": state["aux"] | {"projectors": updates,
                                   "prototypes": jnp.asarray(prototypes, jnp.float32)}}

    def end_task(self, state, task, data):
        state = super().end_task(state, task, data)
        statistics = {name: np.asarray(x) for name, x in state["statistics"].items()}
        z = data.map_audio(self.pooled, state)
        return state | {"statistics": analytic.accumulate(statistics, z, data.labels)}

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        old = aux["classes"]["seen"] & ~aux["classes"]["current"]
        triplet = triplet_loss(outputs["audio"], batch["label"], batch["mask"],
                               aux["prototypes"], old, self.margin)
        return loss + self.triplet_weight * triplet, metrics | {"triplet": triplet}

    def scores(self, model, trainable, frozen, aux, batch):
        return self.pooled(model, trainable, frozen, aux, batch)

    def decide(self, state, scores):
        means = {name: np.asarray(state["statistics"][name]) for name in self.decision}
        return analytic.cosine_scores(means, scores)


def triplet_loss(features: jax.Array, label: jax.Array, mask: jax.Array, prototypes: jax.Array,
                 old: jax.Array, margin: float) -> jax.Array:
    """L_tri, of the hardest positive and the hardest negative of every row of a batch.

    A row alone in its class is its own positive, at distance 0; without a negative it adds nothing.

    Args:
        features: [B, d], of unit length.
        label: int [B].
        mask: bool [B], False on padding.
        prototypes: [C, d].
        old: bool [C], which of them are there.
    """
    both = mask[:, None] & mask[None, :]
    same = label[:, None] == label[None, :]
    others = both & same & ~jnp.eye(len(label), dtype=bool)
    between = _distances(features, features, others | (both & ~same))
    furthest = jnp.where(others, between, 0.0).max(1)
    nearest = jnp.minimum(
        jnp.where(both & ~same, between, jnp.inf).min(1),
        jnp.where(old, _distances(features, prototypes, mask[:, None] & old), jnp.inf).min(1))
    there = mask & jnp.isfinite(nearest)
    rows = margin + furthest - jnp.where(there, nearest, 0.0)
    return jnp.where(there, jnp.maximum(rows, 0.0), 0.0).sum() / jnp.maximum(mask.sum(), 1)


def _distances(x: jax.Array, y: jax.Array, wanted: jax.Array) -> jax.Array:
    """|x_i - y_j| [n, m] of the wanted pairs, 1 for the others: a root of 0 has no gradient."""
    squared = ((x**2).sum(1)[:, None] + (y**2).sum(1)[None, :]
               - 2 * jnp.matmul(x, y.T, precision=_PRECISE))
    return jnp.sqrt(jnp.where(wanted, jnp.maximum(squared, 1e-12), 1.0))
