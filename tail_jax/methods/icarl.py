"""iCaRL (Rebuffi et al., CVPR 2017): exemplars, distilled sigmoids, nearest mean of exemplars.

Full fine-tuning on the clips of a session and on kept ones, with a sigmoid for every class seen,

    L = 1/B sum_i sum over seen c of BCE(q_ic, g_c(x_i)),   g = sigmoid(logits)

where q_ic is g_c(x_i) of the model of the session before for its classes, and 1 or 0 for the
session's own. At the end of a session the memory of K clips is split evenly over the classes seen,
m = K // C_seen each. Of a new class its exemplars are chosen so that the mean of their features
follows that of the class, the k-th being

    p_k = argmin over x not chosen of | mu - (f(x) + sum_{j<k} f(p_j)) / k |              (herding)

with f the unit features of the model as it is then; of an old class the first m stay. A clip has
the class of the nearest mean of exemplars, under the model of the time, means of unit length again.

Batches and the memory are those of ER (`replay.py`), which draws a share of each batch where iCaRL
shuffles the union (ours).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax import analytic
from tail_jax.methods.distillation import Taught
from tail_jax.methods.replay import Replay


@dataclasses.dataclass(frozen=True)
class ICaRL(Taught, Replay):
    """iCaRL; `memory` has `place` besides, an exemplar's number in the order of its class.

    `statistics` has the sums of the exemplars' unit features of each class, and how many they are.

    Attributes:
        capacity: K, at least the number of classes (500: ours, as ER).
    """

    retrieves = False
    decision = ("counts", "sums")

    def init(self, key, model, params):
        return super().init(key, model, params) | {
            "statistics": analytic.empty_moments(model.classes, model.embedding, "none")}

    def memory(self, model, audio_shape, max_tokens):
        if self.capacity < model.classes:
            raise ValueError(f"method.capacity is {self.capacity}; expected at least "
                             f"{model.classes}, an exemplar of each class of the stream")
        return super().memory(model, audio_shape, max_tokens) | {
            "place": np.zeros(self.capacity, np.int32)}

    def kept(self, model, state, task, stage):
        return {}  # batches have rows of the memory, too, and nothing is kept of those

    def end_task(self, state, task, data):
        old = {name: np.asarray(x) for name, x in state["memory"].items()}
        features, labels = data.map_audio(self.embed_audio, state), data.labels
        there = np.unique(np.concatenate([labels, old["label"][old["mask"]]]))
        each = self.capacity // len(there)
        kept = np.flatnonzero(old["mask"] & (old["place"] < each))
        chosen = [np.flatnonzero(labels == number) for number in np.unique(labels)]
        orders = [herding(features[own], each) for own in chosen]
        clips = np.concatenate([own[order] for own, order in zip(chosen, orders)])
        rows = self.rows(state, data, np.stack([clips, clips], 1)) | {
            # Negative, and never used before.
            "clip_id": -1 - old["clips_offered"] - clips.astype(np.int32),
            "place": np.concatenate([np.arange(len(order), dtype=np.int32) for order in orders])}
        count = len(kept) + len(clips)
        memory = {name: np.zeros_like(x) for name, x in old.items()}
        for name, values in rows.items():
            memory[name][:count] = np.concatenate([old[name][kept], values])
        for name in ("pairs_offered", "clips_offered"):
            memory[name] = np.asarray(old[name] + len(labels), np.int32)
        before = features[:0]
        if len(kept):
            before = data.map_rows(self.embed_audio, state, memory["audio"][:len(kept)])
        statistics = analytic.accumulate(
            analytic.empty_moments(*state["statistics"]["sums"].shape, "none"),
            np.concatenate([before, features[clips]]), memory["label"][:count])
        return state | {"memory": memory, "statistics": statistics}

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        seen, mask = aux["classes"]["seen"], batch["mask"]
        own = jax.nn.one_hot(batch["label"], model.classes)
        targets = jnp.where(aux["classes"]["current"], own,
                            jax.nn.sigmoid(outputs["teacher_logits"]))
        logits = outputs["logits"]
        entropies = jax.nn.softplus(logits) - targets * logits  # BCE, without a log of 0
        rows = jnp.where(seen, entropies, 0.0).sum(-1)
        loss = jnp.where(mask, rows, 0.0).sum() / jnp.maximum(mask.sum(), 1)
        return loss, {"classification": loss}

    def scores(self, model, trainable, frozen, aux, batch):
        return self.embed_audio(model, trainable, frozen, aux, batch)

    def decide(self, state, scores):
        means = {name: np.asarray(state["statistics"][name]) for name in self.decision}
        return analytic.cosine_scores(means, scores)


def herding(features: np.ndarray, count: int) -> np.ndarray:
    """int [min(n, count)]: rows of features [n, d] whose running mean follows that of all."""
    features = np.asarray(features, np.float64)
    mean, total = features.mean(0), np.zeros(features.shape[1])
    left, order = np.ones(len(features), bool), []
    for k in range(1, min(len(features), count) + 1):
        distance = np.linalg.norm(mean - (total + features) / k, axis=1)
        order.append(int(np.where(left, distance, np.inf).argmin()))
        left[order[-1]] = False
        total += features[order[-1]]
    return np.array(order, np.int64)
