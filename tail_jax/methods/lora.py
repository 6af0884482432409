"""LoRA on one task after another, and the same with PTAT's distillation."""

from __future__ import annotations

import dataclasses

from tail_jax.methods.distillation import Distilled
from tail_jax.methods.tuned import Tuned
from tail_jax.tuning.lora import DENSE, init_lora, lora_tuning


@dataclasses.dataclass(frozen=True)
class Lora(Tuned):
    """One low-rank update of dense layers for all tasks (`tuning/lora.py`).

        x W  ->  x W + (alpha / r) x a b

    Attributes:
        rank: r.
        alpha: of the scale alpha / r.
        layers: the dense layers of a block, some of `tuning.lora.DENSE`.
    """

    rank: int = 4
    alpha: float = 4.0
    layers: tuple[str, ...] = ("query", "value")

    group = "lora"

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))  # a list where it came from a file
        if self.rank < 1:
            raise ValueError(f"method.rank is {self.rank}; expected at least 1")
        if not self.layers or set(self.layers) - set(DENSE):
            raise ValueError(f"method.layers is {self.layers}; expected some of {DENSE}")

    def init_tuning(self, key, model):
        return init_lora(key, model, self.rank, self.layers)

    def tuning(self, model, tree):
        return lora_tuning(tree, self.alpha / self.rank)


@dataclasses.dataclass(frozen=True)
class LoraDistilled(Distilled, Lora):
    """`Lora` taught by the tree of the step before, as PTAT's prompts are (`Distilled`)."""

    def __post_init__(self):
        Distilled.__post_init__(self)
        Lora.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class JointLora(Lora):
    """`Lora` and a classifier on the shuffled union of all sessions, as many updates: the joint
    training that PACE is compared with (which of its settings those were is not known).

    Attributes:
        learning_rate, heads_learning_rate, weight_decay, rank, alpha, layers: as PACE's (ours); the
            rates are for SGD.
    """

    learning_rate: float = 0.05
    heads_learning_rate: float = 0.01
    weight_decay: float = 5e-4
    rank: int = 10
    alpha: float = 10.0
    layers: tuple[str, ...] = ("key", "value")

    joint = True
    retrieves = False
