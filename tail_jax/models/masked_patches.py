"""Masked prediction over a grid of patches: which are shown, the decoder, targets and errors.

Notation: a grid of `frames x mels` patches, P in all, numbered frame-major as `eat.py` does; k of
them are visible. EAT (Chen et al. 2024, "EAT: Self-Supervised Pre-Training with Efficient Audio
Transformer") is where these parts come from; what is marked (ours) is not.
"""

from __future__ import annotations

from typing import Any, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.models.functions import LayerNorm, gelu


def visible_patches(key: jax.Array, rows: int, grid: tuple[int, int], count: int,
                    block: int) -> jax.Array:
    """Inverse block masks (EAT): int32 [rows, count], the patches that stay visible, ascending.

    Blocks of `block x block` patches are kept, at places drawn for each row, until there are
    `count` patches; the rest is masked. Of the block that would exceed the number, patches drawn at
    random stay (ours: so every row has exactly `count`, and shapes are fixed). Blocks may overlap
    and reach over the edge, so that under one block every patch is as likely visible.

    Args:
        key: of the draws; the same key gives the same masks.
        rows: masks to make.
        grid: patches along (frames, mels).
        count: visible patches of a row, 1 to P.
        block: side of a block, in patches.
    """
    places, ties = jax.random.split(key)
    # One patch at least a block lies in the grid, but not always a new one: `count` blocks are far
    # more than it usually takes, and what they leave is filled with patches at random.
    start = jax.random.randint(places, (rows, count, 2), jnp.asarray([1 - block] * 2),
                               jnp.asarray(grid))
    patch = np.indices(grid).reshape(2, -1).T  # [P, 2]
    offset = patch - start[:, :, None]  # [rows, blocks, P, 2]
    covered = ((offset >= 0) & (offset < block)).all(-1)
    first = jnp.where(covered.any(1), covered.argmax(1), count)  # the block that shows each patch
    order = jnp.argsort(first + jax.random.uniform(ties, first.shape), axis=1)
    return jnp.sort(order[:, :count], axis=1).astype(jnp.int32)


def masked(visible: jax.Array, patches: int) -> jax.Array:
    """bool [..., P], True on the patches that are not among `visible`, int [..., k]."""
    return ~jax.nn.one_hot(visible, patches, dtype=bool).any(-2)


class PatchDecoder(nn.Module):
    """Tokens of the visible patches [B, k, d] to predictions for all of them [B, P, d] (EAT).

    Visible tokens stand at their places and a learned token at the others; 3 x 3 convolutions over
    the grid, each with a norm over the channels and a GELU and added to its input, carry the one to
    the other; a linear layer ends. The first has no input of its width to be added to, unless
    `width` is d.

    Attributes:
        grid: patches along (frames, mels).
        width: channels of the convolutions.
        layers: how many.
        dtype: of the computation.
    """

    grid: tuple[int, int]
    width: int
    layers: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, visible):
        rows, _, width = tokens.shape
        fill = self.param("mask_token", nn.initializers.normal(0.02), (width,))
        empty = jnp.broadcast_to(fill, (int(np.prod(self.grid)), width)).astype(self.dtype)
        x = jax.vmap(lambda own, where: empty.at[where].set(own))(
            tokens.astype(self.dtype), visible)
        x = x.reshape(rows, *self.grid, width)
        for i in range(self.layers):
            y = nn.Conv(self.width, (3, 3), dtype=self.dtype, name=f"conv_{i}")(x)
            y = gelu(LayerNorm(1e-6, dtype=self.dtype, name=f"norm_{i}")(y))
            x = x + y if x.shape == y.shape else y
        x = nn.Dense(width, dtype=self.dtype, name="output")(x)
        return x.reshape(rows, -1, width)


def targets(hidden: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """What a teacher's blocks say of each patch and of the clip: [B, P, d] and [B, d], float32.

    Both are means over the blocks' outputs at the patches (EAT), brought to mean 0 and variance 1
    over their features, so that errors compare. Before the mean over blocks (ours)

        patch:  each feature is brought to mean 0 and variance 1 over the patches of its clip
        clip:   each token is brought to mean 0 and variance 1 over its features; then the mean over
                patches

    The first takes away what all patches of a clip share. With the second's normalisation in its
    place, a teacher that follows fast, as in short runs, came to give all clips one target: on
    synthetic glides, tau from 0.9 to 0.99, the variance of targets over clips fell from 0.37 to
    0.03 in 60 steps. The second keeps what is shared, for the mean over patches of the first is
    next to nothing.

    Args:
        hidden: [B, 1 + P, d] of the input and of each block, CLS first, as `EATTower` gives them.
    """
    outputs = [h[:, 1:].astype(jnp.float32) for h in hidden[1:]]
    return (_standard(sum(_standard(h, axis=1) for h in outputs)),
            _standard(sum(_standard(h).mean(1) for h in outputs)))


def _standard(x, axis=-1, epsilon=1e-6):
    """Mean 0 and variance 1 along an axis."""
    mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + epsilon)


def frame_error(prediction: jax.Array, target: jax.Array, hidden: jax.Array) -> jax.Array:
    """[B]: mean of (prediction - target)^2 over the features of the masked patches of each row.

    Args:
        prediction, target: [B, P, d].
        hidden: bool [B, P], True on masked patches.
    """
    each = jnp.square(prediction - target).mean(-1)
    return (each * hidden).sum(-1) / hidden.sum(-1)


def utterance_error(cls: jax.Array, target: jax.Array) -> jax.Array:
    """[B]: mean over features of (cls - target)^2, both [B, d]."""
    return jnp.square(cls - target).mean(-1)


def variance_over_rows(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The variance over the real rows of [B, ...], averaged over everything else: a scalar.

    0 where every row is given the same: nothing is left of the clip.

    Args:
        mask: bool [B], False on padding rows.
    """
    weight = (mask / jnp.maximum(mask.sum(), 1)).reshape(-1, *[1] * (x.ndim - 1))
    return (weight * jnp.square(x - (weight * x).sum(0))).sum(0).mean()
