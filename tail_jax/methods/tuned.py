"""What methods have in common that leave the towers frozen and train a small tree beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from tail_jax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Tuned(Method):
    """Trains {GROUP: a tree of the method's own, heads, logit_scale}; subclasses make the tree. Of
    a model with classes, the heads are its classifier, and there is no temperature.

    Attributes:
        learning_rate: of the method's own tree.
        heads_learning_rate, scale_learning_rate: of the projection heads and the temperature.
        train_heads, train_scale: whether these are trained at all.
    """

    heads_learning_rate: float = 1e-4
    scale_learning_rate: float = 1e-4
    train_heads: bool = True
    train_scale: bool = True

    # The classifier is new, and starts at zeros; the heads of a dual encoder are pretrained (ours).
    class_defaults = {"heads_learning_rate": 1e-3}
    group = ""  # name of the method's own tree; `training/sharding.py` has to know it

    def init_tuning(self, key, model) -> Any:
        """The method's own tree before the first task, float32."""
        raise NotImplementedError  # a hook without a default: every method has its own

    def tuning(self, model, tree: Any) -> dict | None:
        """The tuning of both towers that this tree stands for."""
        del model, tree

    def init(self, key, model, params):
        # One program: those of single operations hold a megabyte each, and start one by one.
        make = jax.jit(self.init_tuning, static_argnums=1)
        trainable = {self.group: make(key, model)}
        if self.train_heads:
            trainable["heads"] = params["heads"]
        if self.train_scale and "logit_scale" in params:
            trainable["logit_scale"] = params["logit_scale"]
        return {"trainable": trainable, "aux": {}}

    def resolve(self, model, trainable, frozen):
        own = {k: v for k, v in trainable.items() if k != self.group}
        return frozen | own, self.tuning(model, trainable[self.group])

    def forward(self, model, trainable, frozen, aux, batch, key):
        del key  # frozen towers run without dropout
        return super().forward(model, trainable, frozen, aux, batch, None)

    def learning_rates(self):
        return [(rf"{self.group}/.*", self.learning_rate), (r"heads/.*", self.heads_learning_rate),
                (r"logit_scale", self.scale_learning_rate)]

    def weight_decays(self):
        decayed = r".*/(w|kernel)"
        return [(decayed, self.weight_decay), (rf"(?!{decayed}$).*", 0.0)]
