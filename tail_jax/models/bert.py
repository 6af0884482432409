"""BERT and RoBERTa text towers: embeddings and pooling around the transformer stack."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from tail_jax.models.functions import LayerNorm
from tail_jax.models.transformer import BlockConfig, Stack


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A BERT-style encoder.

    Attributes:
        vocab_size, width, layers, heads, hidden: as usual.
        max_positions: rows of the position table (RoBERTa's counts its two reserved rows).
        type_vocab_size: rows of the token-type table; every token has type 0.
        positions: 'tokens' counts real tokens, so that padding on the left does not shift them
            (RoBERTa); 'columns' counts columns of the batch (BERT, as transformers computes it).
        position_offset: first position used: 0 for BERT, pad id + 1 = 2 for RoBERTa.
        pool: 'cls' (BERT), 'pooler' (CLAP's RoBERTa: tanh(W cls + b)) or 'mean' over the mask.
        activation: of the blocks.
        epsilon, dropout: of the blocks and the embedding.
    """

    vocab_size: int = 50265
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    max_positions: int = 514
    type_vocab_size: int = 1
    position_offset: int = 2
    pool: str = "pooler"
    epsilon: float = 1e-12
    dropout: float = 0.0
    activation: str = "gelu"
    positions: str = "tokens"

    def __post_init__(self):
        if self.pool not in ("cls", "pooler", "mean"):
            raise ValueError(f"text pool is {self.pool!r}; expected 'cls', 'pooler' or 'mean'")
        if self.max_tokens < 1:
            raise ValueError(f"max_positions {self.max_positions} leaves no position from "
                             f"position_offset {self.position_offset} on")
        if self.positions not in ("tokens", "columns"):
            raise ValueError(f"text positions is {self.positions!r}; expected 'tokens' or "
                             "'columns'")

    @property
    def max_tokens(self) -> int:
        """Longest sequence the position table holds."""
        return self.max_positions - self.position_offset

    @property
    def layer_widths(self) -> tuple[tuple[int, int], ...]:
        """(number of layers, width) of each stage: one stage."""
        return ((self.layers, self.width),)


class TextTower(nn.Module):
    """Token ids [B, N] to tokens, all hidden states, and one pooled vector."""

    config: TextConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, token_ids, mask, tuning=None, deterministic=True):
        c = self.config
        if token_ids.shape[1] > c.max_tokens:
            raise ValueError(
                f"{token_ids.shape[1]} tokens, but the position table holds {c.max_tokens}; "
                "lower data.max_tokens")
        embed = lambda rows, name: nn.Embed(
            rows, c.width, dtype=self.dtype, name=name,
            embedding_init=nn.initializers.normal(0.02))
        if c.positions == "tokens":
            positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
        else:
            positions = jnp.arange(token_ids.shape[1])
        x = embed(c.vocab_size, "word")(token_ids)
        x += embed(c.max_positions, "position")(positions + c.position_offset)
        x += embed(c.type_vocab_size, "token_type")(jnp.zeros(1, jnp.int32))
        x = LayerNorm(c.epsilon, dtype=self.dtype, name="norm")(x)
        x = nn.Dropout(c.dropout, deterministic=deterministic)(x)
        block = BlockConfig(c.width, c.heads, c.hidden, "post", c.epsilon, c.dropout,
                            self.dtype, c.activation, remat=self.remat)
        # [CLS] / <s>, wherever the padding is.
        first = None if c.pool == "mean" else jnp.argmax(mask, axis=1)[:, None]
        hidden, first, prompts = Stack(block, c.layers, name="encoder")(
            x, mask, tuning, deterministic, first)
        tokens = hidden[-1]
        if c.pool == "mean":
            weight = mask[..., None].astype(tokens.dtype)
            pooled = (tokens * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
        else:
            pooled = first[:, 0]
            if c.pool == "pooler":
                pooled = jnp.tanh(nn.Dense(c.width, dtype=self.dtype, name="pooler")(pooled))
        return {"tokens": tokens, "hidden": hidden, "pooled": pooled, "prompts": prompts}
