"""wav2vec 2.0 (Baevski et al. 2020) and data2vec's audio encoder (Baevski et al. 2022): waveforms.

A stack of strided convolutions makes frames of a waveform, convolutions over frames tell them
their positions, a transformer encodes them. What the two families do differently is settings:

                            wav2vec 2.0 base        large, stable norm      data2vec audio
    feature_norm            group                   layer                   layer
    position_kernel/layers  128 / 1                 128 / 1                 19 / 5
    position_norm           no                      no                      yes
    norm of the blocks      post                    pre                     post

Padding stands at the end of a row and changes nothing: a clip gives the same frames alone and in
any batch. (The published code shifts them for base models, whose group norm averages over it.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tail_jax.models.functions import ACTIVATIONS, LayerNorm
from tail_jax.models.transformer import BlockConfig, Stack

_FEATURE_EPSILON = 1e-5  # of the norms between the convolutions, which no configuration sets


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """A wav2vec 2.0 or data2vec-audio encoder.

    Attributes:
        samples: length of the longest row, at the rate of the model (16 kHz); rows may be shorter.
        feature_widths, feature_kernels, feature_strides: of the convolutions on the waveform.
        feature_bias: whether these have biases.
        feature_norm: 'group' (after the first convolution, each channel over the frames of the
            clip) or 'layer' (after every one, each frame over its channels).
        feature_activation: after every convolution, those of positions too.
        position_kernel, position_groups, position_layers: of the convolutions over frames.
        position_norm: whether each is followed by a layer norm without parameters.
        width, layers, heads, hidden, norm, activation, epsilon, dropout: of the transformer.
    """

    samples: int = 480_000
    feature_widths: tuple[int, ...] = (512,) * 7
    feature_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    feature_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    feature_bias: bool = False
    feature_norm: str = "group"
    feature_activation: str = "gelu"
    position_kernel: int = 128
    position_groups: int = 16
    position_layers: int = 1
    position_norm: bool = False
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    norm: str = "post"
    activation: str = "gelu"
    epsilon: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self):
        sizes = [len(v) for v in (self.feature_widths, self.feature_kernels, self.feature_strides)]
        if len(set(sizes)) > 1:
            raise ValueError(f"feature_widths, feature_kernels and feature_strides have {sizes} "
                             "entries; expected one each for every convolution")
        if self.feature_norm not in ("group", "layer"):
            raise ValueError(f"feature_norm is {self.feature_norm!r}; expected 'group' or 'layer'")
        if self.feature_activation not in ACTIVATIONS:
            raise ValueError(f"feature_activation is {self.feature_activation!r}; expected one of "
                             f"{[*ACTIVATIONS]}")
        for name in ("heads", "position_groups"):
            if self.width % getattr(self, name):
                raise ValueError(f"width {self.width} is not divisible by {name} "
                                 f"{getattr(self, name)}")
        if self.samples < self.min_samples:
            raise ValueError(f"samples is {self.samples}; the convolutions need "
                             f"{self.min_samples} for one frame")

    def frames(self, samples):
        """How many frames that many samples (number or array) make; at most 0 below one frame."""
        for kernel, stride in zip(self.feature_kernels, self.feature_strides):
            samples = (samples - kernel) // stride + 1
        return samples

    @property
    def min_samples(self) -> int:
        """The shortest waveform that makes a frame."""
        samples = 1
        for kernel, stride in zip(self.feature_kernels[::-1], self.feature_strides[::-1]):
            samples = (samples - 1) * stride + kernel
        return samples

    @property
    def input_shape(self) -> tuple[int]:
        """Shape of one row of audio: (samples,)."""
        return (self.samples,)

    @property
    def layer_widths(self) -> tuple[tuple[int, int], ...]:
        """(number of layers, width) of each stage: one stage."""
        return ((self.layers, self.width),)


class _ClipNorm(nn.Module):
    """Each channel of [B, F, c] to mean 0 and variance 1 over the frames where `shown` [B, F]."""

    @nn.compact
    def __call__(self, x, shown):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        weight = (shown / jnp.maximum(shown.sum(1, keepdims=True), 1)).astype(jnp.float32)
        mean = jnp.einsum("bf,bfc->bc", weight, x.astype(jnp.float32))[:, None]
        centred = x.astype(jnp.float32) - mean
        variance = jnp.einsum("bf,bfc->bc", weight, centred ** 2)[:, None]
        out = centred * (jax.lax.rsqrt(variance + _FEATURE_EPSILON) * scale) + bias
        return out.astype(x.dtype)


class Wav2Vec2Tower(nn.Module):
    """Waveforms [B, S] to frames, all hidden states, and the mean of the last over valid frames."""

    config: Wav2Vec2Config
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, audio, mask=None, tuning=None, deterministic=True):
        """Returns tokens [B, F, d], hidden (layers + 1 of them), pooled [B, d], frame_mask [B, F].

        Frames: after each convolution floor((n - kernel) / stride) + 1. `hidden` holds what the
        blocks take and make; of pre-norm encoders `tokens` is its last after the final norm.

        Args:
            audio: [B, S] as the front end normalised it; S is free.
            mask: bool [B, S], True on the samples of the clip, then False on padding.
            tuning: see transformer.py; enters after the positions and their norm.
            deterministic: False applies dropout.
        """
        c = self.config
        if audio.ndim != 2 or audio.shape[1] < c.min_samples:
            raise ValueError(f"wav2vec 2.0 got audio of shape {audio.shape}; expected waveforms "
                             f"[batch, samples] of at least {c.min_samples} samples")
        mask = jnp.ones(audio.shape, bool) if mask is None else mask
        lengths = mask.sum(1, dtype=jnp.int32)
        x = self._features(jnp.where(mask, audio, 0).astype(self.dtype), lengths)  # [B, F, c]
        shown = jnp.arange(x.shape[1]) < c.frames(lengths)[:, None]
        x = LayerNorm(c.epsilon, dtype=self.dtype, name="feature_norm")(x)
        x = nn.Dense(c.width, dtype=self.dtype, name="project")(x)
        x = self._positioned(x, shown[..., None])
        norm = LayerNorm(c.epsilon, dtype=self.dtype, name="norm")
        x = norm(x) if c.norm == "post" else x
        x = nn.Dropout(c.dropout, deterministic=deterministic)(x)
        block = BlockConfig(c.width, c.heads, c.hidden, c.norm, c.epsilon, c.dropout, self.dtype,
                            c.activation, remat=self.remat)
        hidden, _, prompts = Stack(block, c.layers, name="encoder")(
            x, shown, tuning, deterministic)
        tokens = norm(hidden[-1]) if c.norm == "pre" else hidden[-1]
        total = jnp.where(shown[..., None], tokens, 0).sum(1, dtype=jnp.float32)
        pooled = total / jnp.maximum(shown.sum(1, keepdims=True), 1)
        return {"tokens": tokens, "hidden": hidden, "pooled": pooled.astype(self.dtype),
                "prompts": norm(prompts) if c.norm == "pre" else prompts, "frame_mask": shown}

    def _features(self, x, lengths):
        """[B, S] -> [B, F, c]: frames that look at no sample after `lengths` [B] depend on none."""
        c, x = self.config, x[..., None]
        for i, shape in enumerate(zip(c.feature_widths, c.feature_kernels, c.feature_strides)):
            width, kernel, stride = shape
            x = nn.Conv(width, (kernel,), (stride,), "VALID", use_bias=c.feature_bias,
                        dtype=self.dtype, name=f"conv_{i}")(x)
            if c.feature_norm == "layer":
                x = LayerNorm(_FEATURE_EPSILON, dtype=self.dtype, name=f"conv_norm_{i}")(x)
            elif i == 0:
                shown = jnp.arange(x.shape[1]) < ((lengths - kernel) // stride + 1)[:, None]
                x = _ClipNorm(name="conv_norm_0")(x, shown)
            x = ACTIVATIONS[c.feature_activation](x)
        return x

    def _positioned(self, x, shown):
        """Adds what the convolutions over frames say; to them padding is 0, as behind the end."""
        c = self.config
        around = (c.position_kernel // 2, (c.position_kernel - 1) // 2)
        x = y = jnp.where(shown, x, 0)
        for i in range(c.position_layers):
            y = nn.Conv(c.width, (c.position_kernel,), padding=[around], dtype=self.dtype,
                        feature_group_count=c.position_groups, name=f"position_{i}")(y)
            if c.position_norm:
                y = LayerNorm(_FEATURE_EPSILON, dtype=self.dtype, affine=False)(y)
            y = jnp.where(shown, ACTIVATIONS[c.feature_activation](y), 0)
        return x + y
