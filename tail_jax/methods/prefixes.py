"""What the methods share that have key and value prefixes of their own for each task."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax.methods.pool import KeyedPool, Pool, task_mask, with_task
from tail_jax.tuning import pools


@dataclasses.dataclass(frozen=True)
class TaskPrefixes(Pool):
    """Expert prefixes E_m of each task m = 1 .. M, in the lower layers of each tower.

        K <- [P_K; K],  V <- [P_V; V],      (P_K, P_V) = E_m,  a pair for each layer

    Task m trains E_m alone, its rows are embedded with E_m whatever they look like. Afterwards a
    row gets the prefixes of the task that `task_of` says. They stand in the first five of twelve
    layers, of L layers in the first ceil(5 L / 12).

    Attributes:
        expert_length: tokens of P_K, and as many of P_V.
        tasks: of the stream; 0 means as many as it has.
    """

    expert_length: int = 20
    tasks: int = 0

    embedding_aux = ("task",)

    def __post_init__(self):
        if self.expert_length < 1:
            raise ValueError(f"method.expert_length is {self.expert_length}; expected at least 1")

    def task_of(self, side: str, model, trainable, frozen, aux, batch):
        """(task [B] of each row among those seen, facts of the rows as `choose` gives them)."""
        raise NotImplementedError  # a hook without a default: every method has its own

    def layers(self, tower) -> tuple[int, int]:
        """(first layer of E, first layer above E)."""
        return 0, pools.share(tower, 5)

    def init_pool(self, key, tower) -> dict:
        """What a tower's pool holds: arrays [tasks, ...]."""
        return {"expert": pools.init_prefixes(jax.random.split(key, 3)[1], tower,
                                              max(self.tasks, 1), self.expert_length,
                                              *self.layers(tower))}

    def init_tuning(self, key, model):
        return {side: self.init_pool(jax.random.fold_in(key, i), tower)
                for i, (side, tower) in enumerate(model.towers.items())}

    def init(self, key, model, params):
        return with_task(super().init(key, model, params), 0)

    def begin_task(self, state, task, data):
        return with_task(super().begin_task(state, task, data), task)

    def shared(self, tower, pool) -> list:
        """Prefixes of all tasks, as `pools.prefix_tuning` takes them."""
        del tower, pool
        return []

    def update_mask(self, state):
        mask = super().update_mask(state)
        for side, pool in state["trainable"]["pool"].items():
            own = {name: task_mask(state, pool[name]) for name in ("expert", "keys")
                   if name in pool}
            mask["pool"][side] = mask["pool"][side] | own
        return mask

    def choose(self, side, model, trainable, frozen, aux, batch, training):
        pool, tower = trainable["pool"][side], getattr(model, side)
        chosen, facts = self.task_of(side, model, trainable, frozen, aux, batch)
        # In training all rows are of the current task: one prefix without a batch axis.
        row = aux["task"] if training else chosen
        expert = jax.tree.map(lambda x: x[row], pool["expert"])
        own = (*self.layers(tower), expert["key"], expert["value"])
        return pools.prefix_tuning(tower, [*self.shared(tower, pool), own]), facts


@dataclasses.dataclass(frozen=True)
class KeyedPrefixes(TaskPrefixes, KeyedPool):
    """`TaskPrefixes` with a key kappa_m of each task, which the task draws to its queries:

        task m trains E_m and kappa_m:   L = L_task - lambda mean_x cos(q(x), kappa_m)
        a row is embedded with E_j,      j = argmax over the tasks seen of cos(q(x), kappa_j)

    and the pull is summed over all towers.
    """

    def init_pool(self, key, tower):
        keys = jax.random.normal(jax.random.split(key, 3)[2],
                                 (max(self.tasks, 1), pools.query_width(tower)))
        return super().init_pool(key, tower) | {"keys": pools.unit(keys)}

    def task_of(self, side, model, trainable, frozen, aux, batch):
        cosines = pools.cosine(pools.query(side, model, frozen, batch),
                               trainable["pool"][side]["keys"])
        seen = jnp.arange(cosines.shape[1]) <= aux["task"]
        chosen = jnp.argmax(jnp.where(seen, cosines, -jnp.inf), axis=1)
        return chosen, {"pull": cosines[:, aux["task"]], "chosen": chosen[:, None]}
