"""PTAT: prompt tuning for audio-text incremental learning, and the same without distillation.

A PTAT-style reconstruction after the abstract of Text-Audio Incremental Learning (arXiv
2503.04258): audio prompts generate the text prompts through linear maps (`tuning/prompts.py`), and
from the second task on the tree of the step before teaches the new one (ATSFD). What is trained is

    P = {prompts: {audio, pre, post}, heads: {audio, text}, logit_scale: []}

and the teacher is a copy of P beside the same backbone.
"""

from __future__ import annotations

import dataclasses

from tail_jax.methods.distillation import Distilled
from tail_jax.methods.tuned import Tuned
from tail_jax.tuning.prompts import PromptConfig, init_prompts, prompt_tuning


@dataclasses.dataclass(frozen=True)
class Prompts(Tuned):
    """Coupled prompts (and heads) trained on one task after another, no distillation.

    Attributes:
        learning_rate: of prompts and linear maps.
        prompts: shape and coupling.
    """

    learning_rate: float = 2e-3
    prompts: PromptConfig = PromptConfig()

    group = "prompts"
    classifies = False

    def init_tuning(self, key, model):
        return init_prompts(key, self.prompts, model)

    def tuning(self, model, tree):
        return prompt_tuning(self.prompts, model, tree)


@dataclasses.dataclass(frozen=True)
class PTAT(Distilled, Prompts):
    """`Prompts` with similarity and feature distillation from the previous step's P.

        L = L_ret + 1[m > 1] (lambda_s L_sim + lambda_f L_fd),     see `Distilled`
    """
