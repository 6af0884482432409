"""LoRA (Hu et al., Low-Rank Adaptation of Large Language Models, ICLR 2022) for both towers.

    x W  ->  x W + (alpha / r) x a b,        W [in, out], a [in, r], b [r, out]

with a ~ U(+-1/sqrt(in)) and b = 0, so that the model starts as it was.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Dense layers of a block: attention's are square, `up` and `down` go to the inner width and back.
DENSE = ("query", "key", "value", "out", "up", "down")


def init_lora(key: jax.Array, model, rank: int, layers: tuple[str, ...]) -> dict:
    """{audio, text: {dense layer: {a: [L, in, r], b: [L, r, out]}}}; of HTSAT a list over stages.

    Raises:
        ValueError: if a tower has no transformer blocks.
    """
    tree = {}
    for i, (side, tower) in enumerate(model.towers.items()):
        stages = tower.layer_widths
        if not sum(count for count, _ in stages):
            raise ValueError(f"{type(tower).__name__} describes a tower without transformer "
                             "blocks, which takes no LoRA; choose another model.audio.kind")

        def pair(key, name):
            sizes = [(width, _inner(tower, width)) if name == "up" else
                     (_inner(tower, width), width) if name == "down" else (width, width)
                     for _, width in stages]
            counts = [count for count, _ in stages]
            a = [jax.random.uniform(jax.random.fold_in(key, s), (count, source, rank),
                                    minval=-source**-0.5, maxval=source**-0.5)
                 for s, (count, (source, _)) in enumerate(zip(counts, sizes))]
            b = [jnp.zeros((count, rank, target)) for count, (_, target) in zip(counts, sizes)]
            return {"a": a, "b": b} if len(stages) > 1 else {"a": a[0], "b": b[0]}

        keys = jax.random.split(jax.random.fold_in(key, i), len(layers))
        tree[side] = {name: pair(k, name) for name, k in zip(layers, keys)}
    return tree


def _inner(tower, width: int) -> int:
    """Inner width of a tower's feed-forward networks where its tokens are `width` wide."""
    return tower.hidden if hasattr(tower, "hidden") else int(width * tower.mlp_ratio)


def lora_tuning(tree: dict, scale: float) -> dict:
    """The tuning of both towers, `scale` = alpha / r folded into b."""
    scaled = lambda p: {"a": p["a"], "b": jax.tree.map(lambda b: scale * b, p["b"])}
    return {side: {"lora": {name: scaled(p) for name, p in layers.items()}}
            for side, layers in tree.items()}
