"""HTSAT (Chen et al. 2022), CLAP's audio tower: a Swin transformer on a folded log-mel.

The spectrogram [1024 frames, 64 mels] is cut in time into `spec_size // mels` pieces stacked along
frequency, which makes a square image; four stages of shifted-window attention follow. A Swin block
is `transformer.Block` on the layout [batch, windows, window^2, width] with a bias for the relative
position.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.models.transformer import Block, BlockConfig, layer_tuning


@dataclasses.dataclass(frozen=True)
class HTSATConfig:
    """An HTSAT (CLAP, unfused).

    Attributes:
        spec_size: side of the square image; `spec_size / mels` pieces of `spec_size` frames.
        mels: mel bands of the input.
        patch: patch size and stride.
        width: of the first stage; doubles from stage to stage.
        depths, heads: per stage.
        window: side of the attention window, in patches (the whole grid, where that is smaller).
        mlp_ratio, epsilon, dropout: of the blocks.
    """

    spec_size: int = 256
    mels: int = 64
    patch: int = 4
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 8
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self):
        if len(self.depths) != len(self.heads):
            raise ValueError(f"depths {self.depths} and heads {self.heads} differ in length")
        if self.spec_size % self.mels or self.spec_size % self.patch:
            raise ValueError(f"spec_size {self.spec_size} must be a multiple of mels {self.mels} "
                             f"and patch {self.patch}")
        for side in self.sides:
            if side > self.window and side % self.window:
                raise ValueError(f"window {self.window} does not divide a stage of side {side}")
        if self.spec_size // self.patch % 2 ** (len(self.depths) - 1):
            raise ValueError(f"{self.spec_size // self.patch} patches a side cannot be halved "
                             f"{len(self.depths) - 1} times, once between two stages")

    @property
    def frames(self) -> int:
        """Frames of the image; shorter inputs are stretched to it (CLAP: 1001 to 1024)."""
        return self.spec_size * (self.spec_size // self.mels)

    @property
    def input_shape(self) -> tuple[int, int]:
        """(frames, mels) of a row of audio."""
        return self.frames, self.mels

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the token grid of each stage."""
        return tuple(self.spec_size // self.patch >> s for s in range(len(self.depths)))

    @property
    def layer_widths(self) -> tuple[tuple[int, int], ...]:
        """(number of blocks, width) of each stage."""
        return tuple((depth, self.width << s) for s, depth in enumerate(self.depths))


@functools.cache
def _bicubic(source: int, target: int) -> np.ndarray:
    """Matrix [target, source] of cubic interpolation (a = -0.75, ends aligned, edges held)."""
    at = np.arange(target) * (source - 1) / max(target - 1, 1)
    base, a = np.floor(at).astype(int), -0.75
    matrix = np.zeros((target, source), np.float32)
    for tap in range(-1, 3):
        t = np.abs(at - (base + tap))
        weight = np.where(t <= 1, (a + 2) * t**3 - (a + 3) * t**2 + 1,
                          np.where(t < 2, a * (t**3 - 5 * t**2 + 8 * t - 4), 0))
        np.add.at(matrix, (np.arange(target), np.clip(base + tap, 0, source - 1)), weight)
    return matrix


@functools.cache
def _relative_index(window: int) -> np.ndarray:
    """Row of the relative-position table for each (query, key) of a window: [w^2, w^2]."""
    grid = np.stack(np.meshgrid(*[np.arange(window)] * 2, indexing="ij")).reshape(2, -1)
    offset = grid[:, :, None] - grid[:, None, :] + window - 1
    return offset[0] * (2 * window - 1) + offset[1]


@functools.cache
def _shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """[windows, w^2, w^2]: True where both tokens were neighbours before the cyclic shift."""
    region = np.zeros((side, side), np.int32)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            region[rows, columns] = 3 * i + j
    n = side // window
    region = region.reshape(n, window, n, window).transpose(0, 2, 1, 3).reshape(n * n, -1)
    return region[:, :, None] == region[:, None, :]


class SwinBlock(nn.Module):
    """`Block` inside (shifted) windows of a token grid [B, side, side, d]."""

    config: BlockConfig
    side: int
    window: int
    shifted: bool

    @nn.compact
    def __call__(self, x, tuning=None, deterministic=True):
        w = min(self.window, self.side)
        shift = w // 2 if self.shifted and self.side > self.window else 0
        table = self.param("relative_position_bias", nn.initializers.normal(0.02),
                           ((2 * w - 1) ** 2, self.config.heads))
        bias = table[_relative_index(w)].transpose(2, 0, 1)  # [h, w^2, w^2]
        mask = None
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
            mask = jnp.asarray(_shift_mask(self.side, w, shift))[:, None]  # [windows, 1, w^2, w^2]
        batch, n, d = x.shape[0], self.side // w, x.shape[-1]
        x = x.reshape(batch, n, w, n, w, d).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, n * n, w * w, d)
        x = Block(self.config, name="block")(x, bias, mask, tuning, deterministic)
        x = x.reshape(batch, n, n, w, w, d).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, self.side, self.side, d)
        return jnp.roll(x, (shift, shift), (1, 2)) if shift else x


class HTSATTower(nn.Module):
    """Log-mel [B, frames, mels] in dB to tokens, the stages' outputs, and their mean.

    `tuning` holds, for each leaf of the stack's format, a list over stages (with one stage, the
    leaf will do). Prompts are deep only: windows have no common sequence to flow along.
    """

    config: HTSATConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio, mask=None, tuning=None, deterministic=True):
        del mask  # the window is fixed: silence is input, not padding
        c = self.config
        if audio.shape[2] != c.mels or audio.shape[1] > c.frames:
            raise ValueError(f"HTSAT got log-mels of shape {audio.shape[1:]} (frames, mels); "
                             f"this model takes at most {c.frames} frames of {c.mels} mels")
        x = BandNorm(name="input_norm")(audio)
        if x.shape[1] < c.frames:
            x = jnp.einsum("ts,bsm->btm", _bicubic(x.shape[1], c.frames), x,
                           precision=jax.lax.Precision.HIGHEST)
        pieces = c.spec_size // c.mels
        x = x.reshape(-1, pieces, c.spec_size, c.mels).transpose(0, 1, 3, 2)
        x = x.reshape(-1, c.spec_size, c.spec_size, 1).astype(self.dtype)  # [B, freq, time, 1]
        x = nn.Conv(c.width, (c.patch, c.patch), (c.patch, c.patch), "VALID", dtype=self.dtype,
                    name="patch")(x)
        norm = functools.partial(nn.LayerNorm, c.epsilon, dtype=self.dtype)
        x = norm(name="patch_norm")(x)
        x = nn.Dropout(c.dropout, deterministic=deterministic)(x)
        hidden = []
        for s, (depth, width) in enumerate(c.layer_widths):
            if s:
                x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
                x = nn.Dense(width, use_bias=False, dtype=self.dtype, name=f"merge_{s}")(
                    norm(name=f"merge_norm_{s}")(x))
            block = BlockConfig(width, c.heads[s], int(width * c.mlp_ratio), "pre", c.epsilon,
                                c.dropout, self.dtype)
            stage = _stage_tuning(tuning, s, len(c.depths))
            for i, own in enumerate(layer_tuning(stage, depth, 4)):
                x = SwinBlock(block, c.sides[s], c.window, bool(i % 2), name=f"stage_{s}_{i:02d}")(
                    x, own, deterministic)
                hidden.append(x.reshape(x.shape[0], -1, width))
        tokens = norm(name="norm")(hidden[-1])
        return {"tokens": tokens, "hidden": hidden, "pooled": tokens.mean(1)}


def _stage_tuning(tuning, stage: int, stages: int) -> dict:
    """Stage `stage` of a tree whose leaves stand in lists over stages."""
    is_list = lambda node: isinstance(node, (list, tuple))

    def pick(node):
        if is_list(node) and len(node) != stages:
            raise ValueError(f"tuning holds a list of {len(node)} entries; HTSAT has {stages} "
                             "stages and takes one entry a stage")
        return node[stage] if is_list(node) else node

    return jax.tree.map(pick, tuning or {}, is_leaf=is_list)


class BandNorm(nn.Module):
    """Batch normalisation of mel bands with fixed statistics.

        y = scale (x - running_mean) / sqrt(running_var + 1e-5) + bias
    """

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1],)
        mean = self.param("running_mean", nn.initializers.zeros, shape)
        var = self.param("running_var", nn.initializers.ones, shape)
        mean, var = jax.lax.stop_gradient((mean, var))  # else they weigh in gradient clipping
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return (x - mean) * (jax.lax.rsqrt(var + 1e-5) * scale) + bias
