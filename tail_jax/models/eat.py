"""EAT (Chen et al. 2024) and SSLAM (Alex et al. 2025): patches of a log-mel, a post-norm ViT.

Patches have fixed sine-cosine positions, so the parameters do not depend on the length of the
input: the same checkpoint serves any number of frames that is a multiple of the patch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.models.ast import standardise
from tail_jax.models.functions import LayerNorm
from tail_jax.models.transformer import BlockConfig, Stack


@dataclasses.dataclass(frozen=True)
class EATConfig:
    """An EAT encoder (the defaults are the base size).

    Attributes:
        frames, mels: size of the input log-mel, multiples of `patch`.
        patch: side of the square patches, which do not overlap.
        width, layers, heads, hidden: of the encoder.
        pool: 'cls' (EAT's own) or 'mean' over the patches.
        epsilon, dropout: of the blocks.
    """

    frames: int = 1024
    mels: int = 128
    patch: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    pool: str = "cls"
    epsilon: float = 1e-6
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("frames", "mels"):
            if getattr(self, name) % self.patch or getattr(self, name) < self.patch:
                raise ValueError(f"EAT {name} is {getattr(self, name)}; expected a multiple of "
                                 f"patch {self.patch}")
        if self.width % 4:
            raise ValueError(f"EAT width is {self.width}; its positions are sines and cosines of "
                             "two axes, so it must be a multiple of 4")
        if self.pool not in ("cls", "mean"):
            raise ValueError(f"EAT pool is {self.pool!r}; expected 'cls' or 'mean'")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (frames, mels); token order is frame-major."""
        return self.frames // self.patch, self.mels // self.patch

    @property
    def layer_widths(self) -> tuple[tuple[int, int], ...]:
        """(number of layers, width) of each stage: one stage."""
        return ((self.layers, self.width),)

    @property
    def input_shape(self) -> tuple[int, int]:
        """Shape of one row of audio: (frames, mels)."""
        return self.frames, self.mels


@functools.cache
def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed positions of a patch grid (frames, mels), frame-major: float32 [patches, width].

    The first half encodes the mel index p, the second half the frame index; each half is
    [sin(p w), cos(p w)] with w_i = 10000^(-i / (width / 4)), i = 0 .. width / 4 - 1.
    """
    rate = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    wave = lambda p: np.concatenate([f(p.reshape(-1, 1) * rate) for f in (np.sin, np.cos)], 1)
    frame, mel = np.indices(grid)
    return np.concatenate([wave(mel), wave(frame)], 1).astype(np.float32)


class EATTower(nn.Module):
    """Log-mel [B, frames, mels], natural logarithm, to tokens, hidden states and a pooled vector.

    The input is normalised as (x - input_mean) / (2 input_std). CLS takes no position; a norm
    stands before the first block and none after the last.
    """

    config: EATConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, audio, mask=None, tuning=None, deterministic=True, visible=None,
                 entering=None):
        """Returns tokens [B, 1 + patches, width] with CLS first, hidden of every layer, and pooled.

        `visible`, int [B, k], are the patches that enter the blocks, by their number in frame-major
        order; None is all of them. Each keeps the position of its place, CLS always stays.
        `entering`, (number, tokens), are the inputs of that block: what comes before is left out.
        """
        del mask  # the window is fixed: silence is input, not padding
        c = self.config
        start, x = entering or (0, self._tokens(audio, deterministic, visible))
        block = BlockConfig(c.width, c.heads, c.hidden, "post", c.epsilon, c.dropout, self.dtype,
                            remat=self.remat)
        first = jnp.zeros((x.shape[0], 1), int) if c.pool == "cls" else None
        hidden, first, prompts = Stack(block, c.layers, name="encoder")(
            x, None, tuning, deterministic, first, start)
        tokens = hidden[-1]
        pooled = first[:, 0] if c.pool == "cls" else tokens[:, 1:].mean(1)
        return {"tokens": tokens, "hidden": hidden, "pooled": pooled, "prompts": prompts}

    def _tokens(self, audio, deterministic, visible):
        """What enters the first block."""
        c = self.config
        x = standardise(self, audio, -4.268, 4.569)[..., None].astype(self.dtype)
        x = nn.Conv(c.width, (c.patch, c.patch), (c.patch, c.patch), "VALID", dtype=self.dtype,
                    name="patch")(x)
        x = x.reshape(x.shape[0], -1, c.width)
        x += jnp.asarray(sincos_positions(c.grid, c.width), self.dtype)
        if visible is not None:
            x = jnp.take_along_axis(x, visible[..., None], 1)
        cls = self.param("cls", nn.initializers.normal(0.02), (c.width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, c.width)), x], 1)
        x = LayerNorm(c.epsilon, dtype=self.dtype, name="norm")(x)
        return nn.Dropout(c.dropout, deterministic=deterministic)(x)


def encode_patches(config: EATConfig, params: dict, audio: jax.Array,
                   visible: jax.Array | None = None, *, dtype: Any = jnp.float32,
                   remat: bool = False) -> dict:
    """What `EATTower` makes of these patches alone, deterministic and without tuning.

    Args:
        config: of the tower.
        params: its parameters, `params["audio"]` of a dual encoder.
        audio: log-mels [B, frames, mels].
        visible: int [B, k], numbers of the patches to keep; None keeps all.
        dtype: of the computation.
        remat: as of the blocks (`BlockConfig`).

    Returns:
        {tokens [B, 1 + k, width], hidden: of every layer, pooled [B, width]}.
    """
    return EATTower(config, dtype, remat).apply({"params": params}, audio, visible=visible)
