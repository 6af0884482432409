"""HTSAT (Chen et al. 2022), CLAP's audio tower: a Swin transformer on a folded log-mel.

The spectrogram [1024 frames, 64 mels] is cut in time into `spec_size // mels` pieces stacked along
frequency, which makes a square image; stages of shifted-window attention follow. A Swin block is
`transformer.Block` on the layout [batch, windows, window^2, width] with a bias for the relative
position. A fused model sees a long clip as four spectrograms and joins them behind the patches.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.models.functions import LayerNorm
from tail_jax.models.transformer import Block, BlockConfig, layer_tuning, pair


@dataclasses.dataclass(frozen=True)
class HTSATConfig:
    """An HTSAT (CLAP).

    Attributes:
        spec_size: side of the square image, of `spec_size // mels` pieces of `spec_size` frames.
        mels: mel bands of the input; stretched (bicubic) if the pieces leave room for more.
        patch: size of a patch, one number or (along frequency, along time).
        stride: step from patch to patch, likewise; None: `patch`.
        width: of the first stage; doubles from stage to stage.
        depths, heads: per stage.
        window: side of the attention window, in patches (of the grid, where that is smaller).
        mlp_ratio, epsilon, activation, qkv_bias, dropout: of the blocks.
        patch_norm: whether a layer norm follows the patches.
        fusion: whether the input has four channels (see `Fusion`).
        fusion_ratio: width of the first stage over the inner width of the fusion.
    """

    spec_size: int = 256
    mels: int = 64
    patch: int | tuple[int, int] = 4
    stride: int | tuple[int, int] | None = None
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 8
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5
    activation: str = "gelu"
    qkv_bias: bool = True
    dropout: float = 0.0
    patch_norm: bool = True
    fusion: bool = False
    fusion_ratio: int = 4

    def __post_init__(self):
        if len(self.depths) != len(self.heads):
            raise ValueError(f"depths {self.depths} and heads {self.heads} differ in length")
        if self.mels > self.spec_size or self.spec_size % self.pieces:
            raise ValueError(f"spec_size {self.spec_size} must be a multiple of "
                             f"spec_size // mels ({self.mels}) = {self.spec_size // self.mels}")
        for size, step, padding in zip(pair(self.patch), self.steps, self.padding):
            side = self.spec_size // step
            got = (self.spec_size + 2 * padding - size) // step + 1
            if not step <= size <= self.spec_size or got != side:
                raise ValueError(f"patches of {size} with stride {step} do not tile spec_size "
                                 f"{self.spec_size} as {side} patches a side")
            if side % 2 ** (len(self.depths) - 1):
                raise ValueError(f"{side} patches a side cannot be halved "
                                 f"{len(self.depths) - 1} times, once between two stages")
        if self.width * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves nothing of width {self.width}")
        if self.fusion and self.fusion_ratio > self.width:
            raise ValueError(f"fusion_ratio {self.fusion_ratio} leaves nothing of width "
                             f"{self.width}")
        if self.fusion and 3 * pair(self.patch)[1] > self.spec_size + 2 * self.padding[1]:
            raise ValueError(f"three patches of {pair(self.patch)[1]} are longer than spec_size "
                             f"{self.spec_size}; a fused model looks at three at a time")

    @property
    def pieces(self) -> int:
        """Pieces of the spectrogram that make the image."""
        return self.spec_size // self.mels

    @property
    def frames(self) -> int:
        """Frames of the image; shorter inputs are stretched to it (CLAP: 1001 to 1024)."""
        return self.spec_size * self.pieces

    @property
    def input_shape(self) -> tuple[int, int]:
        """Shape of one row of audio: (frames, mels), or that of each channel of a fused model."""
        return self.frames, self.mels

    @property
    def steps(self) -> tuple[int, int]:
        """Stride of the patches along (frequency, time)."""
        return pair(self.patch if self.stride is None else self.stride)

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros around the image, along (frequency, time): overlapping patches reach over it."""
        return tuple((size - step) // 2 for size, step in zip(pair(self.patch), self.steps))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Token grid (frequency, time) of each stage."""
        return tuple(tuple(self.spec_size // step >> s for step in self.steps)
                     for s in range(len(self.depths)))

    @property
    def layer_widths(self) -> tuple[tuple[int, int], ...]:
        """(number of blocks, width) of each stage."""
        return tuple((depth, self.width << s) for s, depth in enumerate(self.depths))

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector, which is that of the last stage."""
        return self.layer_widths[-1][1]


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


def _windows(x, side: int):
    """[B, rows, columns, d] -> [B, windows, side^2, d]."""
    batch, rows, columns, d = x.shape
    x = x.reshape(batch, rows // side, side, columns // side, side, d).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, side * side, d)


@functools.cache
def _shift_mask(grid: tuple[int, int], side: int, shift: int) -> np.ndarray:
    """[windows, side^2, side^2]: True where both tokens were neighbours before the cyclic shift."""
    region = np.zeros((1, *grid, 1), np.int32)
    cuts = (slice(0, -side), slice(-side, -shift), slice(-shift, None))
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            region[:, rows, columns] = 3 * i + j
    region = _windows(region, side)[0, :, :, 0]
    return region[:, :, None] == region[:, None, :]


@functools.cache
def _present(grid: tuple[int, int], padding: tuple[int, int], side: int, shift: int) -> np.ndarray:
    """[windows, side^2, 1]: False on the tokens that fill the shifted grid to whole windows."""
    present = np.pad(np.ones(grid, bool), [(0, n) for n in padding])
    return _windows(np.roll(present, (-shift, -shift), (0, 1))[None, :, :, None], side)[0]


class SwinBlock(nn.Module):
    """`Block` inside (shifted) windows of a token grid [B, rows, columns, d].

    A grid that windows do not divide is filled below and on the right. As in transformers, what
    fills it is attended to (zeros after the norm, hence with the biases as key and value).
    """

    config: BlockConfig
    grid: tuple[int, int]
    window: int
    shifted: bool

    @nn.compact
    def __call__(self, x, tuning=None, deterministic=True):
        rows, columns = self.grid
        side = min(self.window, rows, columns)
        shift = side // 2 if self.shifted and min(rows, columns) > self.window else 0
        table = self.param("relative_position_bias", nn.initializers.normal(0.02),
                           ((2 * side - 1) ** 2, self.config.heads))
        bias = table[_relative_index(side)].transpose(2, 0, 1)  # [h, side^2, side^2]
        mask = present = None
        padding = (-rows % side, -columns % side)
        if any(padding):
            x = jnp.pad(x, [(0, 0), (0, padding[0]), (0, padding[1]), (0, 0)])
            present = jnp.asarray(_present(self.grid, padding, side, shift))
        batch, rows, columns, d = x.shape
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
            mask = jnp.asarray(_shift_mask((rows, columns), side, shift))[:, None]
        x = Block(self.config, name="block")(_windows(x, side), bias, mask, tuning, deterministic,
                                             present)
        x = x.reshape(batch, rows // side, columns // side, side, side, d)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, d)
        x = jnp.roll(x, (shift, shift), (1, 2)) if shift else x
        return x[:, :self.grid[0], :self.grid[1]]


class Fusion(nn.Module):
    """Attentional feature fusion (Dai et al. 2021) of a whole clip with three parts of it.

        gate = sigmoid(local(whole + parts) + global(mean(whole + parts)))
        y = 2 gate whole + 2 (1 - gate) parts

    `whole` are the patches of the clip shrunk in time to the window. The images of its parts
    (front, middle, back) give patches three times as long, which stand one after the other where
    those of the whole clip stand; zeros fill what is left.
    """

    config: HTSATConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, whole, parts, mask=None):
        """Patches [B, rows, columns, d] of the clips, those where `mask` is False not fused.

        Args:
            whole: [B, rows, columns, d].
            parts: images [B, 3, spec_size, spec_size, 1], or [B, 1, ...] for three equal parts.
            mask: bool [B]; None means all True.
        """
        c = self.config
        batch, count = parts.shape[:2]
        size, steps, padding = pair(c.patch), c.steps, c.padding
        x = nn.Conv(c.width, (size[0], 3 * size[1]), (steps[0], 3 * steps[1]),
                    [(n, n) for n in padding], dtype=self.dtype,
                    name="patch")(parts.reshape(batch * count, *parts.shape[2:]))
        x = x.reshape(batch, count, *x.shape[1:])
        x = jnp.repeat(x, 3 // count, 1).transpose(0, 2, 1, 3, 4)
        x = x.reshape(batch, whole.shape[1], -1, c.width)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, whole.shape[2] - x.shape[2]), (0, 0)])

        def branch(name, y):
            for i, width in enumerate((c.width // c.fusion_ratio, c.width)):
                y = nn.relu(y) if i else y
                y = nn.Conv(width, (1, 1), dtype=self.dtype, name=f"{name}_conv_{i}")(y)
                y = BandNorm(name=f"{name}_norm_{i}")(y)
            return y

        both = whole + x
        mean = both.mean((1, 2), keepdims=True)
        gate = nn.sigmoid(branch("local", both) + branch("global", mean))
        fused = (2 * gate * whole + 2 * (1 - gate) * x).astype(self.dtype)
        return fused if mask is None else jnp.where(mask[:, None, None, None], fused, whole)


class HTSATTower(nn.Module):
    """Log-mel [B, frames, mels] in dB to tokens, the blocks' outputs, and the tokens' mean.

    A fused model takes [B, 4, frames, mels] (the whole clip shrunk to the window, front, middle,
    back) and, as `mask`, bool [B]: whether the parts of a clip are looked at (None: all are). Given
    [B, frames, mels] it takes the four to be equal. A model that is not fused ignores `mask`.

    `tuning` holds, for each leaf of the stack's format, a list over stages (with one stage, the
    leaf will do). Prompts are deep only: windows have no common sequence to flow along.
    """

    config: HTSATConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, audio, mask=None, tuning=None, deterministic=True):
        c = self.config
        known = audio.ndim == 3 or c.fusion and audio.ndim == 4 and audio.shape[1] == 4
        if not known or audio.shape[-1] != c.mels or audio.shape[-2] > c.frames:
            four = "one or four spectrograms of " * c.fusion
            raise ValueError(f"HTSAT got log-mels of shape {audio.shape[1:]} (frames, mels); this "
                             f"model takes {four}at most {c.frames} frames of {c.mels} mels")
        images = self._images(BandNorm(name="input_norm")(audio))
        x = nn.Conv(c.width, pair(c.patch), c.steps, [(n, n) for n in c.padding],
                    dtype=self.dtype, name="patch")(images[:, 0])
        if c.fusion:
            x = Fusion(c, self.dtype, name="fusion")(x, images[:, -3:], mask)
        if c.patch_norm:
            x = LayerNorm(1e-5, dtype=self.dtype, name="patch_norm")(x)
        x = nn.Dropout(c.dropout, deterministic=deterministic)(x)
        kind = nn.remat(SwinBlock, static_argnums=(3,)) if self.remat else SwinBlock
        hidden = []
        for s, (depth, width) in enumerate(c.layer_widths):
            if s:
                x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
                x = LayerNorm(1e-5, dtype=self.dtype, name=f"merge_norm_{s}")(x)
                x = nn.Dense(width, use_bias=False, dtype=self.dtype, name=f"merge_{s}")(x)
            block = BlockConfig(width, c.heads[s], int(width * c.mlp_ratio), "pre", c.epsilon,
                                c.dropout, self.dtype, c.activation, c.qkv_bias, self.remat)
            stage = _stage_tuning(tuning, s, len(c.depths))
            for i, own in enumerate(layer_tuning(stage, depth, 4)):
                x = kind(block, c.grids[s], c.window, bool(i % 2), name=f"stage_{s}_{i:02d}")(
                    x, own, deterministic)
                hidden.append(x.reshape(x.shape[0], -1, width))
        tokens = LayerNorm(1e-5, dtype=self.dtype, name="norm")(x)
        tokens = tokens.reshape(x.shape[0], -1, x.shape[-1])
        return {"tokens": tokens, "hidden": hidden, "pooled": tokens.mean(1)}

    def _images(self, x):
        """[B, (4,) frames, mels] -> [B, 1 or 4, spec_size (frequency), spec_size (time), 1]."""
        c, batch = self.config, x.shape[0]
        x = x.reshape(-1, *x.shape[-2:])
        resize = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        if x.shape[1] < c.frames:
            x = resize("ts,bsm->btm", _bicubic(x.shape[1], c.frames), x)
        bands = c.spec_size // c.pieces
        if c.mels < bands:
            x = resize("nm,btm->btn", _bicubic(c.mels, bands), x)
        x = x.reshape(-1, c.pieces, c.spec_size, bands).transpose(0, 1, 3, 2)
        return x.reshape(batch, -1, c.spec_size, c.spec_size, 1).astype(self.dtype)


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
    """Batch normalisation of the last axis (mel bands, channels) with fixed statistics.

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
