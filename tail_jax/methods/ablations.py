"""A method with one thing changed, to say in comparisons what each part is good for.

Each is PTAT, PTAT-plus, PACE, RanPAC or full fine-tuning with other defaults, so that a benchmark
can name it. Other settings (`prompts.text_side`, `prompts.first_layer`, lengths) are set on the command line.

PACE's are those that the paper reports. What it tunes on the first session is added step by step

    pace_untuned, pace_naive, pace_low_head_rate, pace_all_blocks, pace_first_session

(nothing; LoRA and head at one rate; the head at a lower rate; the head warmed up, then frozen; the
blocks chosen), and one part is taken from the whole: pace_untuned (no first session),
pace_first_session (no later sessions), pace_no_boundary, pace_no_projection. That nothing is tuned
without a first session, and the one rate of pace_naive, are our reading. ranpac_untuned is RanPAC
without first-session adaptation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tail_jax.methods.base import Method
from tail_jax.methods.closed_form import RanPAC
from tail_jax.methods.distillation import Distilled
from tail_jax.methods.full import Sequential
from tail_jax.methods.pace import PACE
from tail_jax.methods.ptat import PTAT
from tail_jax.methods.ptat_plus import PTATPlus
from tail_jax.tuning.prompts import PromptConfig


@dataclasses.dataclass(frozen=True)
class SequentialDistilled(Distilled, Sequential):
    """Full fine-tuning with PTAT's distillation: the teacher is a copy of the whole model."""


def _variant(base: type[Method], what: str, **defaults: Any) -> type[Method]:
    """`base` with other defaults."""
    fields = [(name, type(value), dataclasses.field(default=value))
              for name, value in defaults.items()]
    return dataclasses.make_dataclass(
        base.__name__ + "".join(word.title() for word in what.split()), fields, bases=(base,),
        frozen=True, namespace={"__doc__": f"{base.__name__}, {what}.", "__module__": __name__})


# Head and LoRA of all blocks together, on the first session alone.
_JOINTLY = {"multi_session": False, "tune_from": 1, "warm_up": "", "freeze_head": False}

VARIANTS = {
    "ptat_similarity_only": _variant(PTAT, "similarity only", feature_weight=0.0),
    "ptat_feature_only": _variant(PTAT, "feature only", similarity_weight=0.0),
    "ptat_cross_time": _variant(PTAT, "cross time", similarity_form="cross_time"),
    "ptat_uncoupled": _variant(PTAT, "uncoupled", prompts=PromptConfig(coupling="independent")),
    "ptat_length_8": _variant(PTAT, "length 8", prompts=PromptConfig(length=8)),
    "ptat_shallow": _variant(PTAT, "shallow", prompts=PromptConfig(depth="shallow")),
    "ptat_heads_frozen": _variant(PTAT, "heads frozen", train_heads=False, train_scale=False),
    "ptat_plus_hard": _variant(PTATPlus, "hard routing", hard=True),
    "ptat_plus_final": _variant(PTATPlus, "routed by final embeddings", route="final"),
    "ptat_plus_warm": _variant(PTATPlus, "warm start", warm_start=True),
    "ptat_plus_rank_1": _variant(PTATPlus, "rank 1", rank=1, alpha=1.0),
    "ptat_plus_prompts": _variant(PTATPlus, "prompts only", rank=0, head_rank=0,
                                  prompts=PromptConfig(length=8, coupling="independent")),
    "ranpac_untuned": _variant(RanPAC, "untuned", first_session=""),
    "pace_untuned": _variant(PACE, "untuned", first_session=False),
    "pace_naive": _variant(PACE, "naive", **_JOINTLY, head_learning_rate=PACE.learning_rate),
    "pace_low_head_rate": _variant(PACE, "low head rate", **_JOINTLY),
    "pace_all_blocks": _variant(PACE, "all blocks", multi_session=False, tune_from=1),
    "pace_first_session": _variant(PACE, "first session", multi_session=False),
    "pace_no_boundary": _variant(PACE, "no boundary loss", boundary_weight=0.0),
    "pace_no_projection": _variant(PACE, "no projection", project=False),
    "pace_complement": _variant(PACE, "complement", reading="complement"),
}

ABLATIONS = {"sequential_distil": SequentialDistilled} | VARIANTS
