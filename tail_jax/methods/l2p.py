"""L2P (Wang et al., Learning to Prompt for Continual Learning, CVPR 2022), of a dual encoder and on
class streams."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax.methods.pool import KeyedPool
from tail_jax.tuning import pools


@dataclasses.dataclass(frozen=True)
class L2P(KeyedPool):
    """A pool of prompts for all tasks, of which each row takes the best few.

        I(x) = the `chosen` entries with the largest cos(q(x), k_m)
        L = L_task - lambda mean_x sum_{m in I(x)} cos(q(x), k_m),   summed over both modalities

    The prompts of I(x) stand before the tokens of the first layer (`pools.prompt_tuning` says what
    HTSAT does). There is no vote of the batch on the entries, unlike in the released settings: a
    clip's prompts would depend on its neighbours.

    On class streams the defaults are the published ones (lit): prompts of 5 tokens, five of ten,
    lambda 0.1, Adam (no weight decay), and the classifier reads the mean of what the tower makes of
    the prompts. On audio-text corpora the pretrained heads know what the tower pools, not what it
    makes of prompts, so there it pools as it always does (ours).

    Attributes:
        entries: prompts of a pool.
        length: tokens of a prompt.
        chosen: prompts a row takes.
        pool_from: what the heads read, 'tower' (what it pools) or 'prompts' (the mean of their
            outputs; in ViT and text towers).
    """

    entries: int = 10
    length: int = 10
    chosen: int = 4
    pool_from: str = "tower"

    class_defaults = KeyedPool.class_defaults | {
        "length": 5, "chosen": 5, "pull_weight": 0.1, "pool_from": "prompts", "weight_decay": 0.0}

    def __post_init__(self):
        if self.pool_from not in ("tower", "prompts"):
            raise ValueError(f"method.pool_from is {self.pool_from!r}; expected 'tower' or "
                             "'prompts'")
        if not 1 <= self.chosen <= self.entries or self.length < 1:
            raise ValueError(f"method.chosen is {self.chosen}, method.entries {self.entries} and "
                             f"method.length {self.length}; expected 1 <= chosen <= entries, "
                             "length >= 1")

    def init_tuning(self, key, model):
        def pool(key, tower):
            flows = pools.depth(tower) > 1 and len(tower.layer_widths) == 1
            if self.pool_from == "prompts" and not flows:
                raise ValueError("method.pool_from is 'prompts', which do not flow through "
                                 f"{type(tower).__name__.removesuffix('Config')}; expected a ViT "
                                 "of two layers or more, or method.pool_from=tower")
            keys = jax.random.normal(key, (self.entries, pools.query_width(tower)))
            return {"keys": pools.unit(keys), "prompts": pools.init_pool(
                key, tower, self.entries, self.length, pools.entry_ranges(tower))}

        return {side: pool(jax.random.fold_in(key, i), getattr(model, side))
                for i, side in enumerate(model.towers)}

    def choose(self, side, model, trainable, frozen, aux, batch, training):
        pool = trainable["pool"][side]
        cosines = pools.cosine(pools.query(side, model, frozen, batch), pool["keys"])
        best, chosen = jax.lax.top_k(cosines, self.chosen)

        def gather(x):  # [N, 1, n, d] -> [B, 1, chosen n, d]
            x = x[:, 0][chosen]
            return x.reshape(x.shape[0], 1, -1, x.shape[-1])

        tuning = pools.prompt_tuning(getattr(model, side), jax.tree.map(gather, pool["prompts"]))
        return tuning, {"pull": jnp.sum(best, 1), "chosen": chosen}

    def encode(self, side, model, trainable, frozen, aux, batch, key=None, training=False):
        out = super().encode(side, model, trainable, frozen, aux, batch, key, training)
        if self.pool_from == "tower":
            return out
        params, _ = self.resolve(model, trainable, frozen)
        return model.project(side, params, out | {"pooled": out["prompts"].mean(1)})
