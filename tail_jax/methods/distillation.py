"""Teachers for any method, and PTAT's distillation (ATSFD) of similarity and features."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax import losses
from tail_jax.training.sharding import copied


class Taught:
    """Gives the method named after it among the bases of a class a teacher: a copy of its trainable
    tree, taken at the start of each task.

    The outputs of `forward` then hold `teacher_audio` and `teacher_text` (of a model with classes
    `teacher_logits` in place of the latter), without gradient. In the
    first task the two are one, and `aux["distil"]`, the factor of the teacher's terms, is 0.
    """

    def init(self, key, model, params):
        state = super().init(key, model, params)
        return state | {"aux": state["aux"] | {"teacher": state["trainable"],
                                               "distil": jnp.zeros(())}}

    def begin_task(self, state, task, data):
        state = super().begin_task(state, task, data)
        # A copy: an alias would be freed when the step donates the trainable tree.
        return state | {"aux": state["aux"] | {
            "teacher": copied(state["trainable"]),
            "distil": jnp.asarray(task > 0, jnp.float32)}}

    def forward(self, model, trainable, frozen, aux, batch, key):
        outputs, names = super().forward(model, trainable, frozen, aux, batch, key), _names(model)
        if all(name in batch for name in names):
            teacher = {name: batch[name] for name in names}
        else:
            taught = super().forward(model, aux["teacher"], frozen, aux, batch, None)
            teacher = {f"teacher_{name}": value for name, value in taught.items()}
        return outputs | jax.lax.stop_gradient(teacher)

    def kept(self, model, state, task, stage):
        return _names(model)

    def feature(self, name, model, trainable, frozen, aux, batch):
        side, name = _names(model)[name], name.removeprefix("teacher_")
        out = self.encode(side, model, aux["teacher"], frozen, aux, batch)
        return self.row_outputs(side, out)[name]


def _names(model) -> dict[str, str]:
    """{output of the teacher: side}."""
    logits = {"teacher_logits": "audio"} if model.classes else {}
    return {f"teacher_{side}": side for side in model.towers} | logits


@dataclasses.dataclass(frozen=True)
class Distilled(Taught):
    """Adds to the loss L of the method named after it among the bases of a class

        1[m > 1] (lambda_s L_sim + lambda_f L_fd)

    L_sim is `losses.similarity_distillation` ('matrix_kl'), or L_ret between the embeddings of
    one step and those of the other, averaged over both pairings ('cross_time'). L_fd is
    `losses.feature_distillation`, summed over both modalities.

    Attributes:
        similarity_weight, feature_weight: lambda_s, lambda_f.
        similarity_temperature, feature_temperature: T_s, T_f.
        similarity_form: 'matrix_kl' or 'cross_time'.
        feature_form: 'kl', 'cosine' or 'mse'.
    """

    similarity_weight: float = 1.0
    feature_weight: float = 1.0
    similarity_temperature: float = 2.0
    feature_temperature: float = 2.0
    similarity_form: str = "matrix_kl"
    feature_form: str = "kl"

    classifies = False

    def __post_init__(self):
        if self.similarity_form not in ("matrix_kl", "cross_time"):
            raise ValueError(f"method.similarity_form is {self.similarity_form!r}; "
                             "expected 'matrix_kl' or 'cross_time'")
        if self.feature_form not in losses.FEATURE_FORMS:
            raise ValueError(f"method.feature_form is {self.feature_form!r}; "
                             f"expected one of {[*losses.FEATURE_FORMS]}")
        for name in ("similarity_temperature", "feature_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"method.{name} is {getattr(self, name)}; expected more than 0")

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        a, t = outputs["audio"], outputs["text"]
        a_old, t_old = outputs["teacher_audio"], outputs["teacher_text"]
        scale = self.resolve(model, trainable, frozen)[0]["logit_scale"]
        scale_old = self.resolve(model, aux["teacher"], frozen)[0]["logit_scale"]
        mask = batch["mask"]
        if self.similarity_form == "matrix_kl":
            sim = losses.similarity_distillation((a, t, scale), (a_old, t_old, scale_old), mask,
                                                 self.similarity_temperature)
        else:
            sim = sum(losses.retrieval_loss(x, y, scale, batch)
                      for x, y in ((a, t_old), (a_old, t))) / 2
        feature = sum(
            losses.feature_distillation(z, z_old, mask, self.feature_temperature,
                                        self.feature_form) for z, z_old in ((a, a_old), (t, t_old)))
        # In the first task student and teacher are one: weight 0, the same program.
        loss += aux["distil"] * (self.similarity_weight * sim + self.feature_weight * feature)
        return loss, metrics | {"similarity": sim, "feature": feature}
