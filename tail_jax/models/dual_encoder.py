"""The dual encoder: an audio tower, a text tower, two projection heads and one temperature.

    a = unit(head_audio(audio tower)),   t = unit(head_text(text tower)),   score = <a, t>

`DualEncoder` is a frozen description with pure functions; parameters are a plain dict

    {audio: {...}, text: {...}, heads: {audio: {...}, text: {...}}, logit_scale: []}

and tuning is {audio: ..., text: ...} in the format of `transformer.py`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from tail_jax.models.ast import ASTConfig, ASTTower
from tail_jax.models.bert import TextConfig, TextTower
from tail_jax.models.htsat import HTSATConfig, HTSATTower

AUDIO_TOWERS = {"htsat": (HTSATConfig, HTSATTower), "ast": (ASTConfig, ASTTower)}
# Leaves that are statistics of the training data: no gradient, not counted as parameters.
BUFFERS = ("running_mean", "running_var", "input_mean", "input_std")


class Head(nn.Module):
    """CLAP's projection: Linear, ReLU, Linear."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, dtype=self.dtype, name="linear1")(x))
        return nn.Dense(self.width, dtype=self.dtype, name="linear2")(x)


@dataclasses.dataclass(frozen=True)
class DualEncoder:
    """Description of an audio-text model; its methods are pure functions of the parameters.

    Attributes:
        audio: configuration of the audio tower (its type names the tower).
        text: configuration of the text tower.
        embedding: dimension d of the shared space.
        dtype: 'float32' or 'bfloat16', of the towers' computation; heads, norms of the embeddings
            and everything after are float32.
    """

    audio: HTSATConfig | ASTConfig
    text: TextConfig
    embedding: int = 512
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype is {self.dtype!r}; expected 'float32' or 'bfloat16'")

    @classmethod
    def from_dict(cls, config: Mapping) -> "DualEncoder":
        """Builds from nested dicts, such as `config.model`; `audio.kind` chooses the tower.

        Raises:
            ValueError: on a missing or unknown key, naming it.
        """
        config = dict(config)
        missing = sorted({"audio", "text"} - set(config))
        if missing:
            raise ValueError(f"model has no {missing}; it describes an audio and a text tower")
        audio = dict(config.pop("audio"))
        kind = audio.pop("kind", None)
        if kind not in AUDIO_TOWERS:
            raise ValueError(f"model.audio.kind is {kind!r}; expected one of {[*AUDIO_TOWERS]}")
        return cls(audio=_build(AUDIO_TOWERS[kind][0], audio, "model.audio"),
                   text=_build(TextConfig, dict(config.pop("text")), "model.text"),
                   **_known(cls, config, "model"))

    def to_dict(self) -> dict:
        """The nested dict that `from_dict` takes."""
        kind = next(k for k, (c, _) in AUDIO_TOWERS.items() if isinstance(self.audio, c))
        return dataclasses.asdict(self) | {"audio": {"kind": kind} | dataclasses.asdict(self.audio)}

    @property
    def _compute_dtype(self):
        return jnp.dtype(self.dtype)

    def _audio_tower(self):
        kind = next(t for c, t in AUDIO_TOWERS.values() if isinstance(self.audio, c))
        return kind(self.audio, self._compute_dtype)

    def _text_tower(self):
        return TextTower(self.text, self._compute_dtype)

    def input_shapes(self, batch: int, max_tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one batch as the encoders take it."""
        shape = jax.ShapeDtypeStruct
        return {"audio": shape((batch, self.audio.frames, self.audio.mels), jnp.float32),
                "token_ids": shape((batch, max_tokens), jnp.int32),
                "token_mask": shape((batch, max_tokens), jnp.bool_)}

    def init(self, key: jax.Array) -> dict:
        """Random parameters in float32; the temperature starts at 1 / 0.07."""
        keys = jax.random.split(key, 4)
        blank = {k: jnp.zeros(s.shape, s.dtype) for k, s in self.input_shapes(1, 1).items()}
        head = Head(self.embedding)
        make = lambda module, key, *args: module.init(key, *args)["params"]
        return {
            "audio": make(self._audio_tower(), keys[0], blank["audio"]),
            "text": make(self._text_tower(), keys[1], blank["token_ids"],
                         jnp.ones_like(blank["token_mask"])),
            "heads": {
                "audio": make(head, keys[2], jnp.zeros((1, self.audio.layer_widths[-1][1]))),
                "text": make(head, keys[3], jnp.zeros((1, self.text.width)))},
            "logit_scale": jnp.asarray(math.log(1 / 0.07), jnp.float32),
        }

    def encode_audio(self, params: dict, tuning: dict | None, audio: jax.Array,
                     mask: jax.Array | None = None, *, key: jax.Array | None = None) -> dict:
        """Log-mels [B, frames, mels] in dB -> tokens, hidden, pooled, embedding [B, d] (unit rows).

        `key` turns dropout on (training); without it the result is a function of each row alone.
        """
        out = _apply(self._audio_tower(), params["audio"], key, audio, mask,
                     (tuning or {}).get("audio"))
        return self._project(params, "audio", out)

    def encode_text(self, params: dict, tuning: dict | None, token_ids: jax.Array,
                    mask: jax.Array, *, key: jax.Array | None = None) -> dict:
        """Token ids and mask [B, N] -> tokens, hidden, pooled, embedding [B, d] (unit rows)."""
        out = _apply(self._text_tower(), params["text"], key, token_ids, mask,
                     (tuning or {}).get("text"))
        return self._project(params, "text", out)

    def _project(self, params, side, out):
        x = Head(self.embedding).apply({"params": params["heads"][side]},
                                       out["pooled"].astype(jnp.float32))
        return out | {"embedding": x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)}


def _apply(module, params, key, *args):
    rngs = None if key is None else {"dropout": key}
    return module.apply({"params": params}, *args, key is None, rngs=rngs)


def _known(cls, values: dict, where: str) -> dict:
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; expected some of {names}")
    return values


def _build(cls, values: dict, where: str):
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**_known(cls, values, where))
