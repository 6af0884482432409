"""DualPrompt (Wang et al., ECCV 2022) in a dual encoder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax.methods.pool import KeyedPool, task_mask, with_task
from tail_jax.tuning import pools
from tail_jax.tuning.pools import SIDES


@dataclasses.dataclass(frozen=True)
class DualPrompt(KeyedPool):
    """General prefixes G of all tasks, and expert prefixes E_m with a key kappa_m of each task.

        K <- [P_K; K],  V <- [P_V; V],          G in the lower layers, E in those above
        task m trains G, E_m and kappa_m:       L = L_ret - lambda mean_x cos(q(x), kappa_m)
        embedding takes E_j,  j = argmax over the tasks seen of cos(q(x), kappa_j)

    and the pull is summed over both modalities. In towers of 12 layers G stands in layers 0-1 and
    E in 2-4; with L layers G in the first ceil(2 L / 12), and E in those that follow up to
    ceil(5 L / 12), one at least.

    Metrics are the shares of the tasks that the rows would be embedded with, and how often a clip
    and its caption would be given different ones.

    Attributes:
        general_length, expert_length: tokens of P_K, and as many of P_V.
        tasks: of the stream; 0 means as many as it has.
    """

    general_length: int = 5
    expert_length: int = 5
    tasks: int = 0

    embedding_aux = ("task",)

    def __post_init__(self):
        if min(self.general_length, self.expert_length) < 1:
            raise ValueError(f"method.general_length is {self.general_length} and "
                             f"method.expert_length {self.expert_length}; expected at least 1")

    def layers(self, tower) -> tuple[int, int]:
        """(first layer of E, first layer above E)."""
        general = pools.share(tower, 2)
        if pools.depth(tower) < 2:
            raise ValueError("dualprompt needs towers of two layers or more, one for general and "
                             f"one for expert prefixes; {type(tower).__name__} has 1")
        return general, max(pools.share(tower, 5), general + 1)

    def init_tuning(self, key, model):
        def prefixes(key, tower, entries, length, first, last):
            ranges = pools.layer_ranges(tower, first, last)
            return {name: pools.init_pool(k, tower, entries, length, ranges)
                    for name, k in zip(("key", "value"), jax.random.split(key))}

        def pool(key, tower):
            first, last = self.layers(tower)
            keys, tasks = jax.random.split(key, 3), max(self.tasks, 1)
            return {
                "general": prefixes(keys[0], tower, 1, self.general_length, 0, first),
                "expert": prefixes(keys[1], tower, tasks, self.expert_length, first, last),
                "keys": pools.unit(jax.random.normal(keys[2], (tasks, pools.query_width(tower))))}

        return {side: pool(jax.random.fold_in(key, i), getattr(model, side))
                for i, side in enumerate(SIDES)}

    def init(self, key, model, params):
        return with_task(super().init(key, model, params), 0)

    def begin_task(self, state, task, data):
        return with_task(super().begin_task(state, task, data), task)

    def update_mask(self, state):
        mask = super().update_mask(state)
        for side in SIDES:
            pool = state["trainable"]["pool"][side]
            own = {name: task_mask(state, pool[name]) for name in ("expert", "keys")}
            mask["pool"][side] = mask["pool"][side] | own
        return mask

    def choose(self, side, model, trainable, frozen, aux, batch, training):
        pool, tower, task = trainable["pool"][side], getattr(model, side), aux["task"]
        cosines = pools.cosine(pools.query(side, model, frozen, batch), pool["keys"])
        seen = jnp.arange(cosines.shape[1]) <= task
        chosen = jnp.argmax(jnp.where(seen, cosines, -jnp.inf), axis=1)
        first, last = self.layers(tower)
        general = jax.tree.map(lambda x: x[0], pool["general"])
        # In training all rows are of the current task: one prefix without a batch axis.
        expert = jax.tree.map(lambda x: x[task if training else chosen], pool["expert"])
        tuning = pools.prefix_tuning(tower, [
            (0, first, general["key"], general["value"]),
            (first, last, expert["key"], expert["value"])])
        return tuning, {"pull": cosines[:, task], "chosen": chosen[:, None]}

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        differ = (outputs["audio_chosen"] != outputs["text_chosen"])[:, 0] & batch["mask"]
        return loss, metrics | {"tasks_differ": differ.sum() / jnp.maximum(batch["mask"].sum(), 1)}
