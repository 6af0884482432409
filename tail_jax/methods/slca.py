"""SLCA (Zhang et al., ICCV 2023): a slow backbone, and a classifier aligned by what is remembered.

All weights are trained on one session after another, the backbone at a hundredth of the
classifier's rate. Of every class c the mean mu_c and covariance Sigma_c of its features are kept as
the model of its session gave them. After session t (a session's number t_c from 1) the classifier
alone is trained on features drawn from

    z ~ N( (0.9 + 0.1 t_c / t) mu_c, Sigma_c + 1e-4 I ),        256 of each class seen     (lit)

with the cross-entropy over all classes seen of

    logits / (tau m),   m = mean over sessions s of |logits of the classes of s|,  tau = 0.1  (lit)

Sigma_c is kept as rows F_c [k, d] with F_c^T F_c = Sigma_c, and a draw is (0.9 + 0.1 t_c / t) mu_c
+ g F_c + 0.01 h with g, h ~ N(0, I): no matrix is factored again, and a class of n clips needs
n - 1 rows. Drawing is on the host, the step of the alignment one small program for all sessions.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax import losses
from tail_jax.methods.full import Sequential

LEAST_VARIANCE = 1e-4  # added to Sigma_c (lit)


@dataclasses.dataclass(frozen=True)
class SLCA(Sequential):
    """SLCA; the optimizer of the sessions is the run's.

    `statistics` has means [C, d], factors F [C, k, d], float32, and session [C], t_c or 0.

    Attributes:
        learning_rate: of the backbone, a hundredth of that of the classifier (lit).
        head_learning_rate: of the classifier (0.01: lit), in its alignment, too (ours).
        weight_decay: in sessions; the alignment has none (ours).
        samples: of each class in an epoch of the alignment, and rows of its batches (256: lit).
        temperature: tau.
        align_epochs: passes over fresh samples, SGD with momentum 0.9 and a cosine (ours).
        directions: k, rows kept of a class's covariance, the largest; 0 keeps all d. Of 630
            classes of width 768 all are 1.5 GB, and with 8 clips a class 7 lose nothing.
    """

    learning_rate: float = 1e-4
    head_learning_rate: float = 0.01
    weight_decay: float = 5e-4
    samples: int = 256
    temperature: float = 0.1
    align_epochs: int = 5
    directions: int = 0

    retrieves = False

    def __post_init__(self):
        if self.samples < 1 or self.temperature <= 0:
            raise ValueError(f"method.samples and temperature are {self.samples} and "
                             f"{self.temperature}; expected 1 or more, and more than 0")

    def init(self, key, model, params):
        kept = min(self.directions or model.embedding, model.embedding)
        zeros = lambda *shape: np.zeros((model.classes, *shape), np.float32)
        return super().init(key, model, params) | {"statistics": {
            "means": zeros(model.embedding), "factors": zeros(kept, model.embedding),
            "session": np.zeros(model.classes, np.int64)}}

    def learning_rates(self):
        return [(r"heads/.*", self.head_learning_rate), (r"(?!heads/).*", self.learning_rate)]

    def end_task(self, state, task, data):
        z = data.map_audio(self.pooled, state)
        statistics = {name: np.array(x) for name, x in state["statistics"].items()}
        for number in np.unique(data.labels):
            mean, factor = gaussian(z[data.labels == number], statistics["factors"].shape[1])
            statistics["means"][number], statistics["factors"][number] = mean, factor
            statistics["session"][number] = task + 1
        heads = state["trainable"]["heads"]
        aligned = self.align(heads["classes"], statistics, np.random.default_rng(data.seed))
        return state | {"statistics": statistics, "trainable": state["trainable"] | {
            "heads": heads | {"classes": aligned}}}

    def align(self, head: dict, statistics: dict, random: np.random.Generator) -> dict:
        """The classifier {kernel [d, C], bias [C]} after its alignment."""
        # Copies, and no step donates them: the caller's arrays stay.
        head = jax.tree.map(lambda x: jnp.array(jax.device_get(x)), head)
        velocity, session = jax.tree.map(jnp.zeros_like, head), jnp.asarray(statistics["session"])
        batches = np.count_nonzero(statistics["session"])  # of `samples` rows, from each class
        for epoch in range(self.align_epochs):
            z, labels = draw(statistics, self.samples, random)
            order = random.permutation(len(z)).reshape(batches, self.samples)
            rate = self.head_learning_rate * (1 + math.cos(math.pi * epoch / self.align_epochs)) / 2
            for rows in order:
                head, velocity = _align_step(head, velocity, z[rows], labels[rows], session, rate,
                                             self.temperature)
        return head


def gaussian(z: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean [d], F [rows, d]) of features [n, d], F^T F their unbiased covariance.

    With fewer rows than it needs, its best approximation of that rank; one clip has none.
    """
    z = np.asarray(z, np.float64)
    mean = z.mean(0)
    _, values, vectors = np.linalg.svd((z - mean) / max(len(z) - 1, 1) ** 0.5, full_matrices=False)
    kept = (values[:, None] * vectors)[:rows]
    return mean, np.pad(kept, ((0, rows - len(kept)), (0, 0)))


def draw(statistics: dict, samples: int,
         random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(z [samples * classes seen, d] float32, labels), one class after another."""
    session = statistics["session"]
    seen, parts = np.flatnonzero(session), []
    for number in seen:
        mean, factor = statistics["means"][number], statistics["factors"][number]
        scale = 0.9 + 0.1 * session[number] / session.max()
        noise = random.standard_normal((samples, len(factor) + len(mean)), np.float32)
        own, rest = np.split(noise, [len(factor)], axis=1)
        parts.append(scale * mean + own @ factor + LEAST_VARIANCE**0.5 * rest)
    return np.concatenate(parts).astype(np.float32), np.repeat(seen, samples).astype(np.int32)


def normalised(logits: jax.Array, session: jax.Array, temperature: float) -> jax.Array:
    """logits [B, C] / (tau m), m [B] the mean over sessions of the norm of the session's logits.

    Args:
        session: int [C], the number of each class's session from 1; 0 for classes not seen.
    """
    # No stream has more sessions than classes.
    squares = jax.ops.segment_sum((logits**2).T, session, len(session) + 1)[1:]
    there = jax.ops.segment_sum(jnp.ones(len(session)), session, len(session) + 1)[1:] > 0
    # A root of 0 has no gradient: a classifier of zeros has none to divide by.
    norms = jnp.sqrt(jnp.maximum(jnp.where(there[:, None], squares, 1.0), 1e-14))
    mean = jnp.where(there[:, None], norms, 0.0).sum(0) / jnp.maximum(there.sum(), 1)
    return logits / (temperature * mean[:, None])


@functools.partial(jax.jit, static_argnums=6)
def _align_step(head, velocity, z, labels, session, rate, temperature):
    """One step of SGD with momentum 0.9 on a batch of drawn features."""

    def loss(head):
        logits = jnp.matmul(z, head["kernel"], precision=jax.lax.Precision.HIGHEST) + head["bias"]
        return losses.classification_loss(normalised(logits, session, temperature), labels,
                                          session > 0, jnp.ones(len(z), bool))

    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, jax.grad(loss)(head))
    return jax.tree.map(lambda p, v: p - rate * v, head, velocity), velocity
