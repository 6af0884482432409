"""DualPrompt (Wang et al., ECCV 2022), of a dual encoder and on class streams."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax.methods.prefixes import KeyedPrefixes
from tail_jax.tuning import pools


@dataclasses.dataclass(frozen=True)
class DualPrompt(KeyedPrefixes):
    """General prefixes G of all tasks, and expert prefixes E_m with a key kappa_m of each task.

        K <- [P_K; K],  V <- [P_V; V],          G in the lower layers, E in those above
        task m trains G, E_m and kappa_m:       L = L_task - lambda mean_x cos(q(x), kappa_m)
        embedding takes E_j,  j = argmax over the tasks seen of cos(q(x), kappa_j)

    and the pull is summed over both modalities. In towers of 12 layers G stands in layers 0-1 and
    E in 2-4; with L layers G in the first ceil(2 L / 12), and E in those that follow up to
    ceil(5 L / 12), one at least. These ranges and a general length of 5 are published for class
    streams (lit), where the expert length is 5 or 20.

    Metrics are the shares of the tasks that the rows would be embedded with, and how often a clip
    and its caption would be given different ones.

    Attributes:
        general_length, expert_length: tokens of P_K, and as many of P_V.
        tasks: of the stream; 0 means as many as it has.
    """

    general_length: int = 5
    expert_length: int = 5

    def __post_init__(self):
        if min(self.general_length, self.expert_length) < 1:
            raise ValueError(f"method.general_length is {self.general_length} and "
                             f"method.expert_length {self.expert_length}; expected at least 1")

    def layers(self, tower):
        general = pools.share(tower, 2)
        if pools.depth(tower) < 2:
            raise ValueError("dualprompt needs towers of two layers or more, one for general and "
                             f"one for expert prefixes; {type(tower).__name__} has 1")
        return general, max(pools.share(tower, 5), general + 1)

    def init_pool(self, key, tower):
        first, _ = self.layers(tower)
        return super().init_pool(key, tower) | {"general": pools.init_prefixes(
            jax.random.split(key, 3)[0], tower, 1, self.general_length, 0, first)}

    def shared(self, tower, pool):
        general = jax.tree.map(lambda x: x[0], pool["general"])
        return [(0, self.layers(tower)[0], general["key"], general["value"])]

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        if len(model.towers) < 2:
            return loss, metrics
        differ = (outputs["audio_chosen"] != outputs["text_chosen"])[:, 0] & batch["mask"]
        return loss, metrics | {"tasks_differ": differ.sum() / jnp.maximum(batch["mask"].sum(), 1)}
