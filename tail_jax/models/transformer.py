"""The one transformer stack: every tower is settings and a stem around the blocks of this file.

Tuning enters here and nowhere else. A tower takes, beside its parameters, a dict `tuning` with any of

    prompts   [L, n, d] or [B, L, n, d]   extra tokens of layer l; L = 1 means shallow (see below)
    prompts_mask [L, n]                   False takes a prompt out of the attention (layer ranges)
    prefix    {key, value}: [L, n, d] or [B, L, n, d]   extra keys and values, not projected
    adapter   {down: {kernel [L, d, r], bias [L, r]}, up: {kernel [L, r, d], bias [L, d]}, scale [L]}
    lora      {query|key|value|out|up|down: {a [L, in, r], b [L, r, out]}}   scale folded into b

The optional leading batch axis (methods that choose per example) works for all but `prompts_mask`.

Deep prompts are replaced at every layer and what the layer makes of them is thrown away, so they
act on real tokens only as extra keys and values. These are projected once per step, without batch
or window axis: exact, and a fraction of a percent of the layer's cost. Shallow prompts (L = 1) are
concatenated to the tokens once and flow through all layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS = {"gelu": functools.partial(nn.gelu, approximate=False), "relu": nn.relu}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Shape of one transformer block.

    Attributes:
        width: token dimension d.
        heads: attention heads; `width` is divisible by it.
        hidden: inner dimension of the feed-forward network.
        norm: 'pre' (ViT, Swin) or 'post' (BERT) layer normalisation.
        epsilon: epsilon of the layer norms.
        activation: of the feed-forward network, 'gelu' (exact) or 'relu'.
        dropout: rate on both residual branches; acts only when a key is given.
        dtype: of the computation; parameters keep their own.
    """

    width: int
    heads: int
    hidden: int
    norm: str = "pre"
    epsilon: float = 1e-5
    activation: str = "gelu"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm is {self.norm!r}; expected 'pre' or 'post'")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; expected one of {[*ACTIVATIONS]}")


# Rank of one layer's share of a tuning leaf, without a batch axis.
_RANKS = {"prompts": 2, "prompts_mask": 1, "key": 2, "value": 2, "a": 2, "b": 2,
          "kernel": 2, "bias": 1, "scale": 0}


def layer_tuning(tuning: dict | None, index: int) -> dict:
    """The part of `tuning` for layer `index`: the layer axis is gone, a batch axis stays."""

    def pick(path, leaf):
        return leaf[:, index] if leaf.ndim == _RANKS[path[-1].key] + 2 else leaf[index]

    return jax.tree_util.tree_map_with_path(pick, tuning or {})


def is_shallow(tuning: dict | None, layers: int) -> bool:
    """Whether the prompts of `tuning` enter at the first layer only (a layer axis of length 1)."""
    prompts = (tuning or {}).get("prompts")
    if prompts is None or layers == 1:
        return False
    count = prompts.shape[-3]
    if count not in (1, layers):
        raise ValueError(f"prompts have {count} layers; expected {layers} (deep) or 1 (shallow)")
    return count == 1


def _per_example(leaf: jax.Array, rank: int, like: jax.Array) -> jax.Array:
    """Puts axes behind the batch axis of `leaf`, if it has one, to broadcast against `like` [B, ..., S, d]."""
    if leaf.ndim == rank:
        return leaf
    return leaf.reshape(leaf.shape[:1] + (1,) * (like.ndim - 3) + leaf.shape[1:])


def _low_rank(x: jax.Array, lora: dict | None, name: str, like: jax.Array) -> jax.Array | float:
    """x A B for the LoRA factors of the dense layer `name`, 0 without them; `like` are the tokens."""
    if not lora or name not in lora:
        return 0.0
    a, b = (_per_example(lora[name][k].astype(x.dtype), 2, like) for k in ("a", "b"))
    return (x @ a) @ b


def _adapter_dense(x: jax.Array, p: dict) -> jax.Array:
    kernel = _per_example(p["kernel"].astype(x.dtype), 2, x)
    bias = p["bias"].astype(x.dtype)
    return x @ kernel + (bias if bias.ndim == 1 else _per_example(bias[:, None], 2, x))


def attention(query, key, value, bias=None, mask=None):
    """softmax(q k^T / sqrt(d) + bias) v, the softmax in float32.

    Args:
        query: [..., S, h, d]; key, value: [..., K, h, d].
        bias: broadcastable to [..., h, S, K], added to the scores.
        mask: bool, broadcastable to [..., h, S, K]; False positions get no weight.
    """
    scores = jnp.einsum("...qhd,...khd->...hqk", query * query.shape[-1] ** -0.5, key)
    scores = scores.astype(jnp.float32)
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores).astype(value.dtype), value)


class Block(nn.Module):
    """One transformer block on tokens [..., S, d]: attention and feed-forward, pre- or post-norm.

    Leading axes are free: HTSAT passes [batch, windows, 64, d], so a Swin block is this block on
    another layout (everything but attention acts on single tokens).
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, x, bias=None, mask=None, tuning=None, deterministic=True):
        """Returns tokens of the same shape.

        Args:
            x: [batch, ..., S, d].
            bias: attention bias, broadcastable to [..., h, S, S].
            mask: bool, broadcastable to [..., h, S, S].
            tuning: of this layer (see `layer_tuning`).
            deterministic: False applies dropout with the 'dropout' key.
        """
        c, tuning = self.config, tuning or {}
        lora = tuning.get("lora")
        norm1 = nn.LayerNorm(c.epsilon, dtype=c.dtype, name="norm1")
        norm2 = nn.LayerNorm(c.epsilon, dtype=c.dtype, name="norm2")
        drop = nn.Dropout(c.dropout, deterministic=deterministic)
        layers = {name: nn.Dense(width, dtype=c.dtype, name=name) for name, width in {
            "query": c.width, "key": c.width, "value": c.width, "out": c.width,
            "up": c.hidden, "down": c.width}.items()}

        def dense(name, y):
            return layers[name](y) + _low_rank(y, lora, name, x)

        def attend(y):
            # Extra keys and values stand before those of the tokens; see the top of the file.
            keys, values, shown = [dense("key", y)], [dense("value", y)], []
            if "prompts" in tuning:
                prompts = _per_example(tuning["prompts"].astype(c.dtype), 2, x)
                prompts = norm1(prompts) if c.norm == "pre" else prompts
                keys.insert(0, dense("key", prompts))
                values.insert(0, dense("value", prompts))
                shown.insert(0, tuning.get("prompts_mask", jnp.ones(prompts.shape[-2], bool)))
            if "prefix" in tuning:
                prefix = {k: _per_example(p.astype(c.dtype), 2, x)
                          for k, p in tuning["prefix"].items()}
                keys.insert(0, prefix["key"])
                values.insert(0, prefix["value"])
                shown.insert(0, jnp.ones(prefix["key"].shape[-2], bool))
            query, key, value = (
                z.reshape(z.shape[:-1] + (c.heads, c.width // c.heads))
                for z in (dense("query", y), _stack(keys, y), _stack(values, y)))
            out = attention(query, key, value, *_widen(bias, mask, shown, y.shape[-2]))
            return dense("out", out.reshape(y.shape))

        def feed_forward(y):
            return dense("down", ACTIVATIONS[c.activation](dense("up", y)))

        def adapt(h):
            if "adapter" not in tuning:
                return 0.0
            adapter = tuning["adapter"]
            z = _adapter_dense(nn.relu(_adapter_dense(h, adapter["down"])), adapter["up"])
            return z * _per_example(adapter["scale"][..., None, None], 2, h).astype(h.dtype)

        if c.norm == "pre":
            h = x + drop(attend(norm1(x)))
            return h + drop(feed_forward(norm2(h))) + adapt(h)
        h = norm1(x + drop(attend(x)))
        return norm2(h + drop(feed_forward(h)) + adapt(h))


def _stack(parts: list, y: jax.Array) -> jax.Array:
    """Concatenates on the token axis; parts without batch or window axes are broadcast to those of y."""
    if len(parts) == 1:
        return parts[0]
    return jnp.concatenate([jnp.broadcast_to(p, y.shape[:-2] + p.shape[-2:]) for p in parts], -2)


def _widen(bias, mask, shown: list, tokens: int):
    """Extends both to the extra keys: bias 0, mask as in `shown` (a list of bool [n])."""
    if not shown:
        return bias, mask
    shown = jnp.concatenate(shown)
    if bias is not None:
        bias = jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(shown.size, 0)])
    mask = jnp.ones((1, tokens), bool) if mask is None else mask
    extra = jnp.broadcast_to(shown, mask.shape[:-1] + shown.shape)
    return bias, jnp.concatenate([extra, mask], -1)


class Stack(nn.Module):
    """`layers` blocks in a row, with deep or shallow prompts and every other kind of tuning."""

    config: BlockConfig
    layers: int

    @nn.compact
    def __call__(self, x, mask=None, tuning=None, deterministic=True):
        """Returns a list of layers + 1 token arrays: the input and the output of each block.

        Args:
            x: [B, S, d].
            mask: bool [B, S], False on padding.
            tuning: see the top of the file.
            deterministic: False applies dropout.

        Shallow prompts are dropped from what is returned.
        """
        tuning = tuning or {}
        if mask is None:
            mask = jnp.ones(x.shape[:2], bool)
        count = 0
        if is_shallow(tuning, self.layers):
            prompts = tuning["prompts"].astype(x.dtype)[..., 0, :, :]
            count = prompts.shape[-2]
            x = _stack([prompts, x], x)
            mask = jnp.pad(mask, [(0, 0), (count, 0)], constant_values=True)
            tuning = {k: v for k, v in tuning.items() if k != "prompts"}
        hidden = [x]
        for i in range(self.layers):
            x = Block(self.config, name=f"layer_{i:02d}")(
                x, None, mask[:, None, None, :], layer_tuning(tuning, i), deterministic)
            hidden.append(x)
        return [h[:, count:] for h in hidden]
