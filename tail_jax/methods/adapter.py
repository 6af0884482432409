"""CLIP-Adapter (Gao et al., IJCV 2024) on both embeddings of a dual encoder."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from tail_jax.methods.tuned import Tuned
from tail_jax.tuning.pools import SIDES, unit


@dataclasses.dataclass(frozen=True)
class CLAPAdapter(Tuned):
    """A bottleneck behind each head; towers, heads and (by default) temperature stay as they are.

        e' = unit(r MLP(e) + (1 - r) e),      MLP(e) = relu(relu(e W_down) W_up)

    with e the unit embedding [d], W_down [d, d // reduction], no biases, LeCun normal at first.

    Attributes:
        reduction: of the width.
        ratio: r, between 0 and 1; the first value where it is learned.
        learn_ratio: whether r is learned, one for each modality, as the sigmoid of a number.
    """

    train_heads: bool = False
    train_scale: bool = False
    reduction: int = 4
    ratio: float = 0.2
    learn_ratio: bool = False

    group = "adapters"
    classifies = False
    own_encode = True

    def __post_init__(self):
        if not 0 < self.ratio < 1 or self.reduction < 1:
            raise ValueError(f"method.ratio is {self.ratio} and method.reduction "
                             f"{self.reduction}; expected 0 < ratio < 1, reduction >= 1")

    def init_tuning(self, key, model):
        wide, narrow = model.embedding, max(model.embedding // self.reduction, 1)

        def adapter(key):
            down, up = jax.random.split(key)
            normal = lambda key, *shape: jax.random.normal(key, shape) * shape[0] ** -0.5
            tree = {"down": {"kernel": normal(down, wide, narrow)},
                    "up": {"kernel": normal(up, narrow, wide)}}
            if self.learn_ratio:
                tree["ratio"] = jnp.asarray(math.log(self.ratio / (1 - self.ratio)))
            return tree

        return {side: adapter(k) for side, k in zip(SIDES, jax.random.split(key))}

    def encode(self, side, model, trainable, frozen, aux, batch, key=None):
        out = super().encode(side, model, trainable, frozen, aux, batch)
        own, e = trainable["adapters"][side], out["embedding"]
        r = jax.nn.sigmoid(own["ratio"]) if self.learn_ratio else self.ratio
        adapted = jax.nn.relu(jax.nn.relu(e @ own["down"]["kernel"]) @ own["up"]["kernel"])
        return out | {"embedding": unit(r * adapted + (1 - r) * e)}
