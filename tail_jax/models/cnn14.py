"""Cnn14 (Kong et al. 2020), the audio tower of MS-CLAP 2022: twelve 3x3 convolutions on a log-mel.

Batch normalisation has fixed statistics: the tower is a frozen feature extractor, and there are no
transformer blocks that tuning could enter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tail_jax.models.htsat import BandNorm


@dataclasses.dataclass(frozen=True)
class Cnn14Config:
    """A Cnn14 (the defaults are MS-CLAP's: 5 s at 44.1 kHz with a hop of 320).

    Attributes:
        frames, mels: size of the input log-mel.
        channels: of each block; every block but the last halves both axes.
        width: of the pooled vector (the output of `fc1`).
    """

    frames: int = 690
    mels: int = 64
    channels: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    width: int = 2048

    def __post_init__(self):
        if min(self.frames, self.mels) < self.stride:
            raise ValueError(f"Cnn14 takes log-mels of {self.frames} frames and {self.mels} mels; "
                             f"{len(self.channels)} blocks need at least {self.stride} of both")

    @property
    def stride(self) -> int:
        """Frames a step of the last feature map."""
        return 2 ** (len(self.channels) - 1)

    @property
    def layer_widths(self) -> tuple[tuple[int, int], ...]:
        """One stage of no transformer layers, with the width of the pooled vector."""
        return ((0, self.width),)

    @property
    def input_shape(self) -> tuple[int, int]:
        """Shape of one row of audio: (frames, mels)."""
        return self.frames, self.mels


class Cnn14Tower(nn.Module):
    """Log-mel [B, frames, mels] in dB to frame vectors and a pooled vector.

    Returns, with T = frames // 32, A the last map averaged over mels, and fc1 a dense layer:

        tokens  [B, T, channels[-1]]   A
        pooled  [B, width]             relu(fc1(max_t A + mean_t A))
        frames  [B, T - 2, width]      relu(fc1(max + mean of A in windows of 3 steps))
        hidden  list, one a block      maps averaged over mels, [B, T_i, channels[i]]
    """

    config: Cnn14Config
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, audio, mask=None, tuning=None, deterministic=True):
        del mask, deterministic  # the window is fixed, and statistics and weights are frozen
        c = self.config
        if jax.tree.leaves(tuning):
            raise ValueError("Cnn14 has no transformer blocks and takes no tuning; tune the text "
                             "tower, or choose an audio tower of transformer blocks")
        if audio.shape[1:] != c.input_shape:
            raise ValueError(f"Cnn14 got log-mels of shape {audio.shape[1:]} (frames, mels); "
                             f"this model takes {c.input_shape}")
        x = BandNorm(name="input_norm")(audio)[..., None].astype(self.dtype)
        kind, hidden = nn.remat(_Block) if self.remat else _Block, []
        for i, channels in enumerate(c.channels):
            x = kind(channels, self.dtype, name=f"block_{i + 1}")(x)
            if i + 1 < len(c.channels):
                x = nn.avg_pool(x, (2, 2), (2, 2))
            hidden.append(x.mean(2))
        tokens = hidden[-1]
        fc1 = nn.Dense(c.width, dtype=self.dtype, name="fc1")
        near = [pool(tokens, (3,)) for pool in (nn.max_pool, nn.avg_pool)]
        return {"tokens": tokens, "hidden": hidden, "frames": nn.relu(fc1(sum(near))),
                "pooled": nn.relu(fc1(tokens.max(1) + tokens.mean(1)))}


class _Block(nn.Module):
    """Two 3x3 convolutions, each with fixed batch normalisation and ReLU: [B, T, M, channels]."""

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for i in ("1", "2"):
            x = nn.Conv(self.channels, (3, 3), use_bias=False, dtype=self.dtype,
                        name="conv" + i)(x)
            x = nn.relu(BandNorm(name="norm" + i)(x)).astype(self.dtype)
        return x
