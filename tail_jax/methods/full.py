"""Methods that train the whole model: sequential fine-tuning, joint training, and none at all."""

from __future__ import annotations

import dataclasses

from tail_jax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Sequential(Method):
    """Full fine-tuning on one task after another: the plastic extreme, forgets freely.

    Attributes:
        dropout: whether the model's dropout rates act.
    """

    learning_rate: float = 5e-5
    dropout: bool = False

    def init(self, key, model, params):
        return {"trainable": params, "aux": {}}

    def frozen(self, params):
        return {}

    def resolve(self, model, trainable, frozen):
        return trainable, None

    def forward(self, model, trainable, frozen, aux, batch, key):
        return super().forward(model, trainable, frozen, aux, batch, key if self.dropout else None)


@dataclasses.dataclass(frozen=True)
class Joint(Sequential):
    """Full fine-tuning on the shuffled union of all tasks, as many updates: the upper bound."""

    joint = True


@dataclasses.dataclass(frozen=True)
class Frozen(Method):
    """The pretrained model as it is: the stable extreme, zero-shot on all tasks."""

    trains = False
    classifies = False  # nothing has taught it the classes

    def init(self, key, model, params):
        return {"trainable": {}, "aux": {}}

    def resolve(self, model, trainable, frozen):
        return frozen, None
