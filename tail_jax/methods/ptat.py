"""PTAT: prompt tuning for audio-text incremental learning, and the same without distillation.

A PTAT-style reconstruction after the abstract of Text-Audio Incremental Learning (arXiv
2503.04258): audio prompts generate the text prompts through linear maps (`tuning/prompts.py`), and
from the second task on the tree of the step before teaches the new one (ATSFD). What is trained is

    P = {prompts: {audio, pre, post}, heads: {audio, text}, logit_scale: []}

and the teacher is a copy of P beside the same backbone.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from tail_jax import losses
from tail_jax.methods.base import Method
from tail_jax.tuning.prompts import PromptConfig, init_prompts, prompt_tuning


@dataclasses.dataclass(frozen=True)
class Prompts(Method):
    """Coupled prompts (and heads) trained on one task after another, no distillation.

    Attributes:
        learning_rate: of prompts and linear maps.
        heads_learning_rate, scale_learning_rate: of the projection heads and the temperature.
        train_heads, train_scale: whether these belong to P at all.
        prompts: shape and coupling.
    """

    learning_rate: float = 2e-3
    heads_learning_rate: float = 1e-4
    scale_learning_rate: float = 1e-4
    train_heads: bool = True
    train_scale: bool = True
    prompts: PromptConfig = PromptConfig()

    def init(self, key, model, params):
        trainable = {"prompts": init_prompts(key, self.prompts, model)}
        if self.train_heads:
            trainable["heads"] = params["heads"]
        if self.train_scale:
            trainable["logit_scale"] = params["logit_scale"]
        return {"trainable": trainable, "aux": {}}

    def resolve(self, model, trainable, frozen):
        own = {k: v for k, v in trainable.items() if k != "prompts"}
        return frozen | own, prompt_tuning(self.prompts, model, trainable["prompts"])

    def forward(self, model, trainable, frozen, aux, batch, key):
        del key  # frozen towers run without dropout
        return super().forward(model, trainable, frozen, aux, batch, None)

    def learning_rates(self):
        return [(r"prompts/.*", self.learning_rate), (r"heads/.*", self.heads_learning_rate),
                (r"logit_scale", self.scale_learning_rate)]

    def weight_decays(self):
        decayed = r"prompts/.*/w|heads/.*/kernel"
        return [(decayed, self.weight_decay), (rf"(?!({decayed})$).*", 0.0)]


@dataclasses.dataclass(frozen=True)
class PTAT(Prompts):
    """`Prompts` with similarity and feature distillation from the previous step's P.

        L = L_ret + 1[m > 1] (lambda_s L_sim + lambda_f L_fd)

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

    has_teacher = True

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

    def init(self, key, model, params):
        state = super().init(key, model, params)
        return state | {"aux": {"teacher": state["trainable"], "distil": jnp.zeros(())}}

    def forward(self, model, trainable, frozen, aux, batch, key):
        outputs = super().forward(model, trainable, frozen, aux, batch, key)
        return outputs | self.teacher_outputs(model, frozen, aux, batch)

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        a, t = outputs["audio"], outputs["text"]
        a_old, t_old = outputs["teacher_audio"], outputs["teacher_text"]
        scale = self.resolve(model, trainable, frozen)[0]["logit_scale"]
        scale_old = self.resolve(model, aux["teacher"], frozen)[0]["logit_scale"]
        mask = batch["mask"]
        if self.similarity_form == "matrix_kl":
            sim = losses.similarity_distillation(
                losses.similarity(a, t, scale), losses.similarity(a_old, t_old, scale_old), mask,
                self.similarity_temperature)
        else:
            g = losses.positives(batch["clip_id"], batch["caption_key"], mask)
            sim = sum(losses.retrieval_loss(losses.similarity(x, y, scale), g, mask)
                      for x, y in ((a, t_old), (a_old, t))) / 2
        feature = sum(
            losses.feature_distillation(z, z_old, mask, self.feature_temperature,
                                        self.feature_form) for z, z_old in ((a, a_old), (t, t_old)))
        # In the first task student and teacher are one: weight 0, the same program.
        loss += aux["distil"] * (self.similarity_weight * sim + self.feature_weight * feature)
        return loss, metrics | {"similarity": sim, "feature": feature}

