"""LoRA (Hu et al., Low-Rank Adaptation of Large Language Models, ICLR 2022) for both towers.

    x W  ->  x W + (alpha / r) x a b,        a [in, r], b [r, out]

with a ~ U(+-1/sqrt(in)) and b = 0, so that the model starts as it was.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

DENSE = ("query", "key", "value", "out")  # square: width to width


def init_lora(key: jax.Array, model, rank: int, layers: tuple[str, ...]) -> dict:
    """{audio, text: {dense layer: {a: [L, d, r], b: [L, r, d]}}}; of HTSAT a list over stages.

    Raises:
        ValueError: if a tower has no transformer blocks.
    """
    tree = {}
    for i, (side, tower) in enumerate(model.towers.items()):
        stages = tower.layer_widths
        if not sum(count for count, _ in stages):
            raise ValueError(f"{type(tower).__name__} describes a tower without transformer "
                             "blocks, which takes no LoRA; choose another model.audio.kind")

        def pair(key):
            a = [jax.random.uniform(jax.random.fold_in(key, s), (count, width, rank),
                                    minval=-width**-0.5, maxval=width**-0.5)
                 for s, (count, width) in enumerate(stages)]
            b = [jnp.zeros((count, rank, width)) for count, width in stages]
            return {"a": a, "b": b} if len(stages) > 1 else {"a": a[0], "b": b[0]}

        keys = jax.random.split(jax.random.fold_in(key, i), len(layers))
        tree[side] = {name: pair(k) for name, k in zip(layers, keys)}
    return tree


def lora_tuning(tree: dict, scale: float) -> dict:
    """The tuning of both towers, `scale` = alpha / r folded into b."""
    scaled = lambda p: {"a": p["a"], "b": jax.tree.map(lambda b: scale * b, p["b"])}
    return {side: {"lora": {name: scaled(p) for name, p in layers.items()}}
            for side, layers in tree.items()}
