"""PTAT with one thing changed: names for the comparisons that say what each part is good for.

Each is PTAT (or full fine-tuning) with other defaults, so that a benchmark can name it. Settings
that depend on the depth of the towers, such as `prompts.first_layer`, have no name of their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tail_jax.methods.distillation import Distilled
from tail_jax.methods.full import Sequential
from tail_jax.methods.ptat import PTAT
from tail_jax.tuning.prompts import PromptConfig


@dataclasses.dataclass(frozen=True)
class SequentialDistilled(Distilled, Sequential):
    """Full fine-tuning with PTAT's distillation: the teacher is a copy of the whole model."""


def _ptat(what: str, **defaults: Any) -> type[PTAT]:
    """PTAT with other defaults."""
    fields = [(name, type(value), dataclasses.field(default=value))
              for name, value in defaults.items()]
    return dataclasses.make_dataclass(
        "PTAT" + "".join(word.title() for word in what.split()), fields, bases=(PTAT,),
        frozen=True, namespace={"__doc__": f"PTAT, {what}.", "__module__": __name__})


ABLATIONS = {
    "sequential_distil": SequentialDistilled,
    "ptat_similarity_only": _ptat("similarity only", feature_weight=0.0),
    "ptat_feature_only": _ptat("feature only", similarity_weight=0.0),
    "ptat_cross_time": _ptat("cross time", similarity_form="cross_time"),
    "ptat_feature_cosine": _ptat("feature cosine", feature_form="cosine"),
    "ptat_uncoupled": _ptat("uncoupled", prompts=PromptConfig(coupling="independent")),
    "ptat_prefix_only": _ptat("prefix only", prompts=PromptConfig(text_side="prefix")),
    "ptat_suffix_only": _ptat("suffix only", prompts=PromptConfig(text_side="suffix")),
    "ptat_length_8": _ptat("length 8", prompts=PromptConfig(length=8)),
    "ptat_length_16": _ptat("length 16", prompts=PromptConfig(length=16)),
    "ptat_shallow": _ptat("shallow", prompts=PromptConfig(depth="shallow")),
    "ptat_heads_frozen": _ptat("heads frozen", train_heads=False, train_scale=False),
}
