"""Learning without forgetting (Li and Hoiem, ECCV 2016), for classes and for a dual encoder.

The model of the task before, m - 1, teaches the whole model on the new task's data. Where there are
classes, the outputs of the old ones are kept. A dual encoder has none; what is kept instead is

    LwF-F   the embeddings        L = L_ret + lambda/B sum_i ( ||a_i - a_i'||^2 + ||t_i - t_i'||^2 )
    LwF-S   the similarities      L = L_ret + lambda L_sim,   `losses.similarity_distillation`

with ' for the teacher's. The same terms on the tree of prompts are `ptat` with feature_form=mse and
similarity_weight=0, or feature_weight=0.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax import losses
from tail_jax.methods.distillation import Taught
from tail_jax.methods.full import Sequential


@dataclasses.dataclass(frozen=True)
class LwF(Taught, Sequential):
    """LwF as published: the distribution over the classes of earlier sessions stays.

        L = CE - lambda/B sum_i sum over old c of p'_c(x_i) log p_c(x_i),  p = softmax(logits / T)

    Attributes:
        old_weight: lambda.
        temperature: T.
    """

    old_weight: float = 0.5
    temperature: float = 2.0

    retrieves = False

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"method.temperature is {self.temperature}; expected more than 0")

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        old = aux["classes"]["seen"] & ~aux["classes"]["current"]
        new_log_p, old_log_p = (
            jax.nn.log_softmax(jnp.where(old, outputs[name] / self.temperature, losses.NEGATIVE))
            for name in ("logits", "teacher_logits"))
        rows = -jnp.where(old, jnp.exp(old_log_p) * new_log_p, 0.0).sum(-1)
        mask = batch["mask"]
        term = jnp.where(mask, rows, 0.0).sum() / jnp.maximum(mask.sum(), 1)
        return loss + aux["distil"] * self.old_weight * term, metrics | {"old": term}


@dataclasses.dataclass(frozen=True)
class LwFFeature(Taught, Sequential):
    """LwF-F: embeddings stay where the model of the task before puts them.

    Attributes:
        feature_weight: lambda.
    """

    feature_weight: float = 1.0

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        feature = sum(losses.feature_distillation(
            outputs[side], outputs[f"teacher_{side}"], batch["mask"], 1.0, "mse")
            for side in model.towers)
        loss += aux["distil"] * self.feature_weight * feature
        return loss, metrics | {"feature": feature}


@dataclasses.dataclass(frozen=True)
class LwFSimilarity(Taught, Sequential):
    """LwF-S: who resembles whom within a batch stays as under the model of the task before.

    Attributes:
        similarity_weight: lambda.
        similarity_temperature: T, of both sides; each has its own scale besides.
    """

    similarity_weight: float = 1.0
    similarity_temperature: float = 2.0

    classifies = False

    def __post_init__(self):
        if self.similarity_temperature <= 0:
            raise ValueError(f"method.similarity_temperature is {self.similarity_temperature}; "
                             "expected more than 0")

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        new = outputs["audio"], outputs["text"], trainable["logit_scale"]
        old = outputs["teacher_audio"], outputs["teacher_text"], aux["teacher"]["logit_scale"]
        similarity = losses.similarity_distillation(new, old, batch["mask"],
                                                    self.similarity_temperature)
        loss += aux["distil"] * self.similarity_weight * similarity
        return loss, metrics | {"similarity": similarity}
