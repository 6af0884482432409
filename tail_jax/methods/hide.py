"""HiDe-Prompt (Wang et al., Hierarchical Decomposition of Prompt-Based Continual Learning, NeurIPS
2023) on class streams."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax import losses
from tail_jax.methods.prefixes import TaskPrefixes
from tail_jax.tuning import pools
from tail_jax.tuning.pseudo_features import (add_classes, class_means, fit, init_mlp, linear, mlp,
                                             no_statistics)

SIDE = "audio"


@dataclasses.dataclass(frozen=True)
class HiDePrompt(TaskPrefixes):
    """Prefixes p_t for each session (`TaskPrefixes`), chosen and judged by replayed statistics.

        start of session t     p_t <- p_{t-1}                                              (lit)
        training of both       L = CE + lambda L_con,  CE among the session's own classes  (lit)
        end of session t       p_t <- (1 - epsilon) p_t + epsilon mean_{s < t} p_s         (lit)
                               once, before anything is read under p_t                     (ours)

    L_con is the cross-entropy of M M^T / tau with identity targets, M [C_old + B, d] the means of
    the old classes above the features of the batch: they are to lie apart from each other. It is a
    mean over the rows of M, features enter as the tower pools them; one mean a class (ours).

    After each session two sets of statistics get its classes (`tuning/pseudo_features.py`), of
    features under p_t and of features without any prefix, K centroids and diagonal variances a
    class. On pseudo-features of all classes seen are then trained

        the head        from where it is, on prompted statistics, CE among all classes seen (lit)
        the router      an MLP d -> d -> T, from scratch, on unprompted ones: which session? (lit;
                        its width, and that it has the head's schedule, are ours)

    A clip is classified with the prefixes of the session that the router says of its unprompted
    feature.

    Attributes:
        learning_rate, epochs, expert_length: as S-Prompt++: Adam at 0.005 (so without weight
            decay), 50 epochs, 20 tokens in layers 1 to 5 of 12 (lit).
        heads_learning_rate: while the prefixes are trained, the same (ours).
        contrast_weight: lambda; 0.01 to 0.5 (lit), 0.1 (ours).
        contrast_temperature: tau, 0.8 (lit).
        ensemble: epsilon, 0.01 (lit).
        centroids: K, 10 (lit).
        alignment_epochs, alignment_rate: of SGD on pseudo-features, 30 and 0.005 (lit).
        alignment_momentum: of it, with a cosine (ours).
        alignment_samples: pseudo-features of each class in an epoch (ours).
        alignment_batch: of them in a step (ours).
    """

    learning_rate: float = 0.005
    weight_decay: float = 0.0
    heads_learning_rate: float = 0.005
    epochs: int = 50
    contrast_weight: float = 0.1
    contrast_temperature: float = 0.8
    ensemble: float = 0.01
    centroids: int = 10
    alignment_epochs: int = 30
    alignment_rate: float = 0.005
    alignment_momentum: float = 0.9
    alignment_samples: int = 24
    alignment_batch: int = 120

    embedding_aux = ("task", "router")
    retrieves = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("centroids", "alignment_samples", "alignment_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.{name} is {getattr(self, name)}; expected at least 1")
        if not self.contrast_temperature > 0:
            raise ValueError(f"method.contrast_temperature is {self.contrast_temperature}; "
                             "expected more than 0")

    # --- state -------------------------------------------------------------------------------

    def init(self, key, model, params):
        state = super().init(key, model, params)
        width, classes = pools.query_width(model.audio), model.classes
        empty = lambda: no_statistics(classes, self.centroids, width)
        aux = state["aux"] | {"router": self._new_router(key, width),
                              "means": jnp.zeros((classes, width))}
        # `session` is that of each class, -1 of a class that has not been seen.
        return state | {"aux": aux, "statistics": {
            "prompted": empty(), "unprompted": empty(),
            "session": np.full(classes, -1, np.int32)}}

    def _new_router(self, key, width):
        return init_mlp(key, width, max(self.tasks, 1))

    def begin_task(self, state, task, data):
        state = super().begin_task(state, task, data)
        means = jnp.asarray(class_means(state["statistics"]["prompted"]))
        state = state | {"aux": state["aux"] | {"means": means}}
        return self._with_prefixes(state, lambda x: x.at[task].set(x[task - 1])) if task else state

    def end_task(self, state, task, data):
        if task:
            state = self._with_prefixes(state, lambda x: x.at[task].set(
                (1 - self.ensemble) * x[task] + self.ensemble * x[:task].mean(0)))
        labels, old = data.labels, state["statistics"]
        session = np.array(old["session"])
        session[np.unique(labels)] = task
        kept = {name: add_classes(old[name], data.map_audio(read, state), labels, data.seed)
                for name, read in (("prompted", self._read_prompted),
                                   ("unprompted", self._read_unprompted))}
        keys = jax.random.split(data.key, 3)
        seen, numbers = session >= 0, np.arange(len(session), dtype=np.int32)
        heads = jax.device_get(state["trainable"]["heads"])
        head = self._fit(linear, heads["classes"], kept["prompted"], seen, numbers, seen, keys[0])
        router = self._new_router(keys[1], pools.query_width(data.model.audio))
        sessions = np.arange(max(self.tasks, 1)) <= task
        router = self._fit(mlp, router, kept["unprompted"], seen, session, sessions, keys[2])
        return state | {
            "trainable": state["trainable"] | {"heads": heads | {"classes": head}},
            "aux": state["aux"] | {"router": router}, "statistics": kept | {"session": session}}

    def _fit(self, apply, parameters, statistics, present, targets, outputs, key):
        """`pseudo_features.fit` with the settings of the method; arrays on the host."""
        total = self.alignment_epochs * self.alignment_samples * int(present.sum())
        steps = np.int32(-(-total // self.alignment_batch))
        return jax.device_get(fit(
            apply, jax.device_get(parameters), statistics, present, targets, outputs, key, steps,
            np.float32(self.alignment_rate), np.float32(self.alignment_momentum),
            batch=self.alignment_batch))

    def _with_prefixes(self, state, change):
        """The state with `change` made to every array [tasks, ...] of prefixes."""
        pool = state["trainable"]["pool"]
        pool = {side: tree | {"expert": jax.tree.map(lambda x: change(jnp.asarray(x)),
                                                     tree["expert"])}
                for side, tree in pool.items()}
        return state | {"trainable": state["trainable"] | {"pool": pool}}

    # As `TaskData` takes them; the same functions in every task, so that they are compiled once.

    def _read_prompted(self, model, trainable, frozen, aux, batch):
        out = self.encode(SIDE, model, trainable, frozen, aux, batch, training=True)
        return out["pooled"].astype(jnp.float32)

    def _read_unprompted(self, model, trainable, frozen, aux, batch):
        return pools.query(SIDE, model, frozen, batch)

    # --- the step ----------------------------------------------------------------------------

    def task_of(self, side, model, trainable, frozen, aux, batch):
        scores = mlp(aux["router"], pools.query(side, model, frozen, batch))
        seen = jnp.arange(scores.shape[1]) <= aux["task"]
        return jnp.argmax(jnp.where(seen, scores, -jnp.inf), axis=1), {}

    def row_outputs(self, side, out):
        return super().row_outputs(side, out) | {"features": out["pooled"].astype(jnp.float32)}

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        old = aux["classes"]["seen"] & ~aux["classes"]["current"]
        term = contrast(aux["means"], old, outputs["features"], batch["mask"],
                        self.contrast_temperature)
        return loss + self.contrast_weight * term, metrics | {"contrast": term}


def contrast(means: jax.Array, old: jax.Array, features: jax.Array, mask: jax.Array,
             temperature: float) -> jax.Array:
    """Mean over rows i of M of -log softmax(M M^T / temperature)_ii, M the rows that are on.

    Args:
        means: [C, d] of classes, on where `old` [C].
        features: [B, d], on where `mask` [B].
    """
    m, on = jnp.concatenate([means, features]), jnp.concatenate([old, mask])
    s = jnp.matmul(m, m.T, precision=jax.lax.Precision.HIGHEST) / temperature
    rows = -jnp.diag(jax.nn.log_softmax(jnp.where(on, s, losses.NEGATIVE)))
    return jnp.where(on, rows, 0.0).sum() / jnp.maximum(on.sum(), 1)
