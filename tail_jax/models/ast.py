"""Audio Spectrogram Transformer (Gong et al. 2021): patches of a log-mel, a DeiT encoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tail_jax.models.functions import LayerNorm
from tail_jax.models.transformer import BlockConfig, Stack, pair


@dataclasses.dataclass(frozen=True)
class ASTConfig:
    """An AST.

    Attributes:
        frames, mels: fixed size of the input log-mel.
        patch: side of the square patch.
        stride: its step, one number or (along mels, along frames).
        width, layers, heads, hidden: of the encoder.
        activation, qkv_bias, epsilon, dropout: of the blocks.
    """

    frames: int = 1024
    mels: int = 128
    patch: int = 16
    stride: int | tuple[int, int] = 10
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    epsilon: float = 1e-12
    dropout: float = 0.0
    activation: str = "gelu"
    qkv_bias: bool = True

    def __post_init__(self):
        if self.patch > min(self.mels, self.frames):
            raise ValueError(f"patch {self.patch} is larger than the log-mel of {self.frames} "
                             f"frames and {self.mels} mels")

    @property
    def input_shape(self) -> tuple[int, int]:
        """Shape of one row of audio: (frames, mels)."""
        return self.frames, self.mels

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (mels, frames); token order is mel-major."""
        return tuple((size - self.patch) // step + 1
                     for size, step in zip((self.mels, self.frames), pair(self.stride)))

    @property
    def layer_widths(self) -> tuple[tuple[int, int], ...]:
        """(number of layers, width) of each stage: one stage."""
        return ((self.layers, self.width),)


def standardise(tower: nn.Module, audio: jax.Array, mean: float, std: float) -> jax.Array:
    """(x - input_mean) / (2 input_std) of log-mels [B, frames, mels], to be called in `tower`.

    The two statistics are parameters of the tower, `mean` and `std` their first values.
    """
    if audio.shape[1:] != tower.config.input_shape:
        raise ValueError(f"{type(tower).__name__.removesuffix('Tower')} got log-mels of shape "
                         f"{audio.shape[1:]} (frames, mels); this model takes "
                         f"{tower.config.input_shape}")
    statistics = (tower.param("input_mean", nn.initializers.constant(mean), ()),
                  tower.param("input_std", nn.initializers.constant(std), ()))
    mean, std = jax.lax.stop_gradient(statistics)  # they are not learned
    return (audio - mean) / (2 * std)


class ASTTower(nn.Module):
    """Log-mel [B, frames, mels], natural logarithm, to tokens, hidden, and mean of CLS and DIST."""

    config: ASTConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, audio, mask=None, tuning=None, deterministic=True, entering=None):
        """`entering`, (number, tokens), are the inputs of that block, as of `EATTower`."""
        del mask  # the window is fixed: silence is input, not padding
        c = self.config
        start, x = entering or (0, self._tokens(audio, deterministic))
        block = BlockConfig(c.width, c.heads, c.hidden, "pre", c.epsilon, c.dropout,
                            self.dtype, c.activation, c.qkv_bias, self.remat)
        special = jnp.broadcast_to(jnp.arange(2), (x.shape[0], 2))
        hidden, special, prompts = Stack(block, c.layers, name="encoder")(
            x, None, tuning, deterministic, special, start)
        norm = LayerNorm(c.epsilon, dtype=self.dtype, name="norm")
        return {"tokens": norm(hidden[-1]), "hidden": hidden, "pooled": norm(special).mean(1),
                "prompts": norm(prompts)}

    def _tokens(self, audio, deterministic):
        """What enters the first block."""
        c = self.config
        x = standardise(self, audio, -4.2677393, 4.5689974)
        x = x.transpose(0, 2, 1)[..., None].astype(self.dtype)
        x = nn.Conv(c.width, (c.patch, c.patch), pair(c.stride), "VALID", dtype=self.dtype,
                    name="patch")(x)
        x = x.reshape(x.shape[0], -1, c.width)
        small = nn.initializers.normal(0.02)
        special = jnp.stack([self.param("cls", small, (c.width,)),
                             self.param("dist", small, (c.width,))]).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(special, (x.shape[0],) + special.shape), x], 1)
        x += self.param("position", small, (x.shape[1], c.width)).astype(self.dtype)
        return nn.Dropout(c.dropout, deterministic=deterministic)(x)
