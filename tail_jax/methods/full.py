"""Methods that train the whole model: sequential fine-tuning, joint training, and none at all."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

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
class Taught(Sequential):
    """Full fine-tuning beside a copy of the model of the task before; subclasses say what it does.

    In the first task the two are one and `aux["distil"]`, the factor of the teacher's term, is 0.
    """

    has_teacher = True

    def init(self, key, model, params):
        return {"trainable": params, "aux": {"teacher": params, "distil": jnp.zeros(())}}

    def forward(self, model, trainable, frozen, aux, batch, key):
        outputs = super().forward(model, trainable, frozen, aux, batch, key)
        return outputs | self.teacher_outputs(model, frozen, aux, batch)


@dataclasses.dataclass(frozen=True)
class Frozen(Method):
    """The pretrained model as it is: the stable extreme, zero-shot on all tasks."""

    trains = False

    def init(self, key, model, params):
        return {"trainable": {}, "aux": {}}

    def resolve(self, model, trainable, frozen):
        return frozen, None
