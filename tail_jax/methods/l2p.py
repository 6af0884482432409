"""L2P (Wang et al., Learning to Prompt for Continual Learning, CVPR 2022) in a dual encoder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax.methods.pool import KeyedPool
from tail_jax.tuning import pools
from tail_jax.tuning.pools import SIDES


@dataclasses.dataclass(frozen=True)
class L2P(KeyedPool):
    """A pool of prompts for all tasks, of which each row takes the best few.

        I(x) = the `chosen` entries with the largest cos(q(x), k_m)
        L = L_ret - lambda mean_x sum_{m in I(x)} cos(q(x), k_m),   summed over both modalities

    The prompts of I(x) stand before the tokens of the first layer (`pools.prompt_tuning` says what
    HTSAT does). There is no vote of the batch on the entries, unlike in the released settings, and
    the tower pools as it always does.

    Attributes:
        entries: prompts of a pool.
        length: tokens of a prompt.
        chosen: prompts a row takes.
    """

    entries: int = 10
    length: int = 10
    chosen: int = 4

    def __post_init__(self):
        if not 1 <= self.chosen <= self.entries or self.length < 1:
            raise ValueError(f"method.chosen is {self.chosen}, method.entries {self.entries} and "
                             f"method.length {self.length}; expected 1 <= chosen <= entries, "
                             "length >= 1")

    def init_tuning(self, key, model):
        def pool(key, tower):
            pools.depth(tower)
            keys = jax.random.normal(key, (self.entries, pools.query_width(tower)))
            return {"keys": pools.unit(keys), "prompts": pools.init_pool(
                key, tower, self.entries, self.length, pools.entry_ranges(tower))}

        return {side: pool(jax.random.fold_in(key, i), getattr(model, side))
                for i, side in enumerate(SIDES)}

    def choose(self, side, model, trainable, frozen, aux, batch, training):
        pool = trainable["pool"][side]
        cosines = pools.cosine(pools.query(side, model, frozen, batch), pool["keys"])
        best, chosen = jax.lax.top_k(cosines, self.chosen)

        def gather(x):  # [N, 1, n, d] -> [B, 1, chosen n, d]
            x = x[:, 0][chosen]
            return x.reshape(x.shape[0], 1, -1, x.shape[-1])

        tuning = pools.prompt_tuning(getattr(model, side), jax.tree.map(gather, pool["prompts"]))
        return tuning, {"pull": jnp.sum(best, 1), "chosen": chosen}
