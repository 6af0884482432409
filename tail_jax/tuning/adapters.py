"""Parallel bottleneck adapters (AdaptFormer, Chen et al., NeurIPS 2022) of the audio tower.

    feed-forward(norm(h)) + s ( relu(h W_down + b_down) W_up + b_up )

in every block, as `models/transformer.py` takes them, with W_down ~ U(+-1/sqrt d) and the rest 0,
so that the model starts as it was.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def init_adapters(key: jax.Array, tower, bottleneck: int) -> dict:
    """{down: {kernel [L, d, r], bias [L, r]}, up: {kernel [L, r, d], bias [L, d]}}.

    Raises:
        ValueError: if the tower is not one stage of transformer blocks (HTSAT has several).
    """
    if len(tower.layer_widths) != 1:
        raise ValueError(f"{type(tower).__name__} describes a tower of "
                         f"{len(tower.layer_widths)} stages; adapters need one stage of "
                         "transformer blocks, choose another model.audio.kind")
    (layers, width), = tower.layer_widths
    down = jax.random.uniform(key, (layers, width, bottleneck), minval=-width**-0.5,
                              maxval=width**-0.5)
    return {"down": {"kernel": down, "bias": jnp.zeros((layers, bottleneck))},
            "up": {"kernel": jnp.zeros((layers, bottleneck, width)),
                   "bias": jnp.zeros((layers, width))}}


def adapter_tuning(tree: dict, scale: float) -> dict:
    """The tower's tuning with these adapters, s = `scale` in every block."""
    layers = tree["down"]["kernel"].shape[0]
    return {"adapter": tree | {"scale": jnp.full((layers,), scale)}}
