"""The one transformer stack: every tower is settings and a stem around the blocks of this file.

Tuning enters here and nowhere else. A tower takes, beside its parameters, a dict `tuning` with any
of (L layers, width d)

    prompts       [L, n, d]           extra tokens of each layer; L = 1 means shallow (see below)
    prompts_mask  [L, n]              False takes a prompt out of the attention (layer ranges)
    prefix        {key, value}: [L, n, d]               extra keys and values, not projected
    prefix_mask   [L, n]              as prompts_mask
    adapter       {down: {kernel [L, d, r], bias [L, r]}, up: {kernel [L, r, d], bias [L, d]},
                   scale [L]}         scale * (relu(h W_down + b_down) W_up + b_up), h the input of
                                      the feed-forward branch before its norm, added to its output
    lora          {query|key|value|out|up|down: {a [L, in, r], b [L, r, out]}}
                                      x a b added to that dense layer; any scale is folded into b

Every leaf but the masks may have a batch axis in front (methods that choose per example).

Deep prompts are replaced at every layer and what the layer makes of them is thrown away, so they
act on real tokens only as extra keys and values. These are projected once per step, without batch
or window axis: exact, and a fraction of a percent of the layer's cost. Shallow prompts (L = 1) are
concatenated to the tokens once and flow through all layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tail_jax.models.functions import ACTIVATIONS, LayerNorm, attention

def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(value, value) of a number, two numbers as they are: sizes along the axes of an image."""
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Shape of one transformer block.

    Attributes:
        width: token dimension d.
        heads: attention heads; `width` is divisible by it.
        hidden: inner dimension of the feed-forward network.
        norm: 'pre' (ViT, Swin) or 'post' (BERT) layer normalisation.
        epsilon: epsilon of the layer norms.
        dropout: rate on both residual branches; acts only when a key is given.
        dtype: of the computation; parameters keep their own.
        activation: of the feed-forward network, one of `functions.ACTIVATIONS`.
        qkv_bias: whether the query, key and value projections have biases.
        remat: the backward pass computes the block again instead of finding its inside in memory.
    """

    width: int
    heads: int
    hidden: int
    norm: str = "pre"
    epsilon: float = 1e-5
    dropout: float = 0.0
    dtype: Any = jnp.float32
    activation: str = "gelu"
    qkv_bias: bool = True
    remat: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm is {self.norm!r}; expected 'pre' or 'post'")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; expected one of "
                             f"{[*ACTIVATIONS]}")


_DENSE = ("query", "key", "value", "out", "up", "down")
# Rank of one layer's share of each tuning leaf, without a batch axis.
_RANKS = {
    "prompts": 2, "prompts_mask": 1, "prefix": {"key": 2, "value": 2}, "prefix_mask": 1,
    "adapter": {"down": {"kernel": 2, "bias": 1}, "up": {"kernel": 2, "bias": 1}, "scale": 0},
    "lora": {name: {"a": 2, "b": 2} for name in _DENSE}}


def layer_tuning(tuning: dict | None, layers: int, ndim: int) -> list[dict]:
    """One dict for each of `layers` layers, its leaves ready to meet tokens of `ndim` dimensions.

    The layer axis is gone. Biases and scales become matrices [1, d] and [1, 1], and matrices with
    a batch axis [B, 1, ..., n, d], so that all broadcast against [B, ..., S, d]. A mask stays [n].

    Raises:
        ValueError: on a leaf that the format does not know, or of another rank or layer count.
    """

    def split(name, node, rank):
        if isinstance(rank, dict) and isinstance(node, dict):
            unknown = sorted(set(node) - set(rank))
            if unknown:
                raise ValueError(f"tuning {name or 'tree'} has unknown entries {unknown}; "
                                 f"expected some of {[*rank]}")
            parts = {k: split(f"{name}/{k}".strip("/"), v, rank[k]) for k, v in node.items()}
            return [{k: part[i] for k, part in parts.items()} for i in range(layers)]
        if isinstance(rank, dict) or isinstance(node, dict):
            raise ValueError(f"tuning {name} is a {type(node).__name__}; see transformer.py")
        is_mask = name.endswith("_mask")
        batch = node.shape[:1] if node.ndim == rank + 2 and not is_mask else ()
        if node.ndim != len(batch) + 1 + rank or node.shape[len(batch)] != layers:
            raise ValueError(f"tuning {name} has shape {node.shape}; expected [{layers} layers, "
                             f"{rank} more axes], with or without a batch axis before them")
        if is_mask:
            return list(node)
        matrix = (1,) * (2 - rank) + node.shape[len(batch) + 1:]
        shape = batch + (1,) * (ndim - 3) * len(batch) + matrix
        return [(node[:, i] if batch else node[i]).reshape(shape) for i in range(layers)]

    return split("", tuning or {}, _RANKS)


def is_shallow(tuning: dict | None, layers: int) -> bool:
    """Whether the prompts of `tuning` enter at the first layer only (a layer axis of length 1)."""
    prompts = (tuning or {}).get("prompts")
    return prompts is not None and layers > 1 and prompts.ndim > 2 and prompts.shape[-3] == 1


class Block(nn.Module):
    """One transformer block on tokens [..., S, d]: attention and feed-forward, pre- or post-norm.

    Leading axes are free: HTSAT passes [batch, windows, 64, d], so a Swin block is this block on
    another layout (everything but attention acts on single tokens).
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, x, bias=None, mask=None, tuning=None, deterministic=True, present=None,
                 chosen=None):
        """Returns tokens of the same shape, or the chosen ones alone.

        Args:
            x: [batch, ..., S, d].
            bias: attention bias, broadcastable to [..., h, S, S].
            mask: bool, broadcastable to [..., h, S, S].
            tuning: of this layer, from `layer_tuning`.
            deterministic: False applies dropout with the 'dropout' key.
            present: bool, broadcastable to [..., S, 1]; the other tokens meet the attention as
                zeros, after the norm of a pre-norm block, and are attended to like any (HTSAT
                fills grids up to whole windows so).
            chosen: int [batch, k], the tokens whose output is wanted; all are attended to, and all
                else is computed for these alone.
        """
        c, tuning = self.config, jax.tree.map(self._cast, tuning or {})
        lora = tuning.get("lora", {})
        norm1 = LayerNorm(c.epsilon, dtype=c.dtype, name="norm1")
        norm2 = LayerNorm(c.epsilon, dtype=c.dtype, name="norm2")
        drop = nn.Dropout(c.dropout, deterministic=deterministic)
        widths = dict.fromkeys(_DENSE, c.width) | {"up": c.hidden}
        layers = {name: nn.Dense(w, c.qkv_bias or name not in ("query", "key", "value"),
                                 dtype=c.dtype, name=name) for name, w in widths.items()}

        def dense(name, y):
            low_rank = (y @ lora[name]["a"]) @ lora[name]["b"] if name in lora else 0.0
            return layers[name](y) + low_rank

        def pick(y):
            return y if chosen is None else jnp.take_along_axis(y, chosen[..., None], -2)

        def attend(y):
            y = y if present is None else jnp.where(present, y, 0)
            # Extra keys and values stand before those of the tokens; see the top of the file.
            keys, values, shown = [dense("key", y)], [dense("value", y)], []
            if "prompts" in tuning:
                prompts = tuning["prompts"]
                prompts = norm1(prompts) if c.norm == "pre" else prompts
                keys.insert(0, dense("key", prompts))
                values.insert(0, dense("value", prompts))
                shown.insert(0, tuning.get("prompts_mask", jnp.ones(prompts.shape[-2], bool)))
            if "prefix" in tuning:
                keys.insert(0, tuning["prefix"]["key"])
                values.insert(0, tuning["prefix"]["value"])
                shown.insert(0, tuning.get("prefix_mask", jnp.ones(keys[0].shape[-2], bool)))
            query, key, value = (
                z.reshape(z.shape[:-1] + (c.heads, c.width // c.heads)).swapaxes(-3, -2)
                for z in (dense("query", pick(y)), _stack(keys, y), _stack(values, y)))
            out = attention(query, key, value, *_widen(bias, mask, shown, y.shape[-2]))
            out = out.swapaxes(-3, -2)
            return dense("out", out.reshape(out.shape[:-2] + (c.width,)))

        def feed_forward(y):
            # As a matrix, where memory matters and no item has low ranks of its own: XLA adds a bias
            # in place only where the sum has the shape of the product (50 MB in HTSAT's first
            # stage). A TPU's program would read 6 % more.
            own = any(leaf.ndim > 2 for leaf in jax.tree.leaves(lora))
            flat = y.reshape(-1, c.width) if c.remat and not own else y
            out = dense("down", ACTIVATIONS[c.activation](dense("up", flat)))
            return out.reshape(y.shape)

        def adapt(h):
            if "adapter" not in tuning:
                return 0.0
            down, up, scale = (tuning["adapter"][k] for k in ("down", "up", "scale"))
            z = nn.relu(h @ down["kernel"] + down["bias"])
            return scale * (z @ up["kernel"] + up["bias"])

        if c.norm == "pre":
            h = pick(x) + drop(attend(norm1(x)))
            return h + drop(feed_forward(norm2(h))) + adapt(h)
        h = norm1(pick(x) + drop(attend(x)))
        return norm2(h + drop(feed_forward(h)) + adapt(h))

    def _cast(self, leaf):
        return leaf if leaf.dtype == bool else leaf.astype(self.config.dtype)


def _stack(parts: list, y: jax.Array) -> jax.Array:
    """Concatenates on the token axis; parts without batch or window axes get those of y."""
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
    def __call__(self, x, mask=None, tuning=None, deterministic=True, chosen=None, start=0):
        """Returns (hidden, chosen tokens, prompts).

        hidden is a list of layers - start + 1 token arrays: the input of the first block that is
        run and the output of each. The
        chosen tokens [B, k, d] are the same as in hidden[-1], but computed by themselves: where
        only they are used, the compiler drops the last block's work on all others, 7 % of a
        12-layer text tower. Prompts [B, n, d] are what the last block makes of shallow prompts (n =
        0 without any), computed by themselves, too; in `hidden` and the tokens they are not.

        Args:
            x: [B, S, d].
            mask: bool [B, S], False on padding.
            tuning: see the top of the file.
            deterministic: False applies dropout.
            chosen: int [B, k], tokens that a tower pools; None: hidden[-1] is returned for them.
            start: number of the block that x enters, those before it are left out.

        Raises:
            ValueError: for shallow prompts where they would enter in the middle.
        """
        tuning = tuning or {}
        if start and is_shallow(tuning, self.layers):
            raise ValueError(f"shallow prompts enter at block 0 and the stack starts at {start}")
        if mask is None:
            mask = jnp.ones(x.shape[:2], bool)
        count = 0
        if is_shallow(tuning, self.layers):
            prompts = tuning["prompts"].astype(x.dtype)[..., 0, :, :]
            count = prompts.shape[-2]
            x = _stack([prompts, x], x)
            mask = jnp.pad(mask, [(0, 0), (count, 0)], constant_values=True)
            tuning = {k: v for k, v in tuning.items() if k != "prompts"}
        hidden, alone, prompted = [x], x, x[:, :0]
        layers = list(enumerate(layer_tuning(tuning, self.layers, x.ndim)))
        kind = nn.remat(Block, static_argnums=(5,)) if self.config.remat else Block
        for i, own in layers[start:]:
            block = kind(self.config, name=f"layer_{i:02d}")
            inputs = hidden[-1], None, mask[:, None, None, :], own, deterministic
            if chosen is not None and i == self.layers - 1:
                alone = block(*inputs, chosen=chosen + count)
            if count and i == self.layers - 1:
                first = jnp.broadcast_to(jnp.arange(count), (x.shape[0], count))
                prompted = block(*inputs, chosen=first)
            hidden.append(block(*inputs))
        hidden = [h[:, count:] for h in hidden]
        return hidden, hidden[-1] if chosen is None else alone, prompted
