"""The dual encoder: an audio tower, a text tower, two projection heads and one temperature.

    a = unit(head_audio(audio tower)),   t = unit(head_text(text tower)),   score = <a, t>

`DualEncoder` is a frozen description with pure functions; parameters are a plain dict

    {audio: {...}, text: {...}, heads: {audio: {...}, text: {...}}, logit_scale: []}

and tuning is {audio: ..., text: ...} in the format of `transformer.py`. With one tower only there
are no such heads and no temperature: the embedding is the unit vector of what the tower pools. An
audio tower alone may have a linear classifier of it, {heads: {classes: {kernel [d, C], bias [C]}}}.
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
from tail_jax.models.cnn14 import Cnn14Config, Cnn14Tower
from tail_jax.models.eat import EATConfig, EATTower
from tail_jax.models.functions import ACTIVATIONS, LayerNorm
from tail_jax.models.htsat import HTSATConfig, HTSATTower
from tail_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Tower

AUDIO_TOWERS = {"htsat": (HTSATConfig, HTSATTower), "ast": (ASTConfig, ASTTower),
                "eat": (EATConfig, EATTower), "cnn14": (Cnn14Config, Cnn14Tower),
                "wav2vec2": (Wav2Vec2Config, Wav2Vec2Tower)}
# Leaves that are statistics of the training data: no gradient, not counted as parameters.
BUFFERS = ("running_mean", "running_var", "input_mean", "input_std")
# Begins the entries of a batch that hold inputs of a block of the audio tower, before its number.
HIDDEN = "hidden_"

HEADS = ("mlp", "residual")


class Head(nn.Module):
    """A projection in float32: of CLAP ('mlp') or of MS-CLAP ('residual').

    mlp:       W2 act(W1 x + b1) + b2
    residual:  e = W1 x,  LayerNorm(e + W2 gelu(e))
    """

    width: int
    kind: str = "mlp"
    activation: str = "relu"

    @nn.compact
    def __call__(self, x):
        bias = self.kind == "mlp"
        linear = lambda name: nn.Dense(self.width, use_bias=bias, name=name)
        e = linear("linear1")(x)
        if bias:
            return linear("linear2")(ACTIVATIONS[self.activation](e))
        return LayerNorm(1e-5, name="norm")(e + linear("linear2")(ACTIVATIONS["gelu"](e)))


@dataclasses.dataclass(frozen=True)
class DualEncoder:
    """Description of an audio-text model; its methods are pure functions of the parameters.

    Attributes:
        audio: configuration of the audio tower (its type names the tower); None without one.
        text: configuration of the text tower; None without one.
        embedding: dimension d of the shared space; with one tower, its width.
        head: 'mlp' or 'residual', see `Head`.
        head_activation: of the 'mlp' head: 'relu', 'gelu', 'gelu_tanh' or 'silu'.
        dtype: 'float32' or 'bfloat16', of the towers' computation; heads, norms of the embeddings
            and everything after are float32.
        classes: C of a classifier beside an audio tower alone; 0 without one.
        remat: whether the backward pass computes the towers' blocks again (less memory, more time);
            of a training, so no part of the description on disk.
    """

    audio: Any  # a configuration of AUDIO_TOWERS, or None
    text: TextConfig | None
    embedding: int = 512
    head: str = "mlp"
    head_activation: str = "relu"
    dtype: str = "float32"
    classes: int = 0
    remat: bool = False

    def __post_init__(self):
        if not self.towers:
            raise ValueError("a model has no tower; expected audio, text or both")
        if self.classes and [*self.towers] != ["audio"]:
            raise ValueError(f"a model with {self.classes} classes has the towers "
                             f"{[*self.towers]}; expected audio alone")
        if len(self.towers) == 1:
            object.__setattr__(self, "embedding", _width(next(iter(self.towers.values()))))
        if self.head not in HEADS:
            raise ValueError(f"model.head is {self.head!r}; expected one of {HEADS}")
        if self.head_activation not in ACTIVATIONS:
            raise ValueError(f"model.head_activation is {self.head_activation!r}; expected one of "
                             f"{[*ACTIVATIONS]}")
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
        audio, text = config.pop("audio"), config.pop("text")
        if audio is not None:
            audio = dict(audio)
            kind = audio.pop("kind", None)
            if kind not in AUDIO_TOWERS:
                raise ValueError(
                    f"model.audio.kind is {kind!r}; expected one of {[*AUDIO_TOWERS]}")
            audio = _build(AUDIO_TOWERS[kind][0], audio, "model.audio")
        if text is not None:
            text = _build(TextConfig, dict(text), "model.text")
        return cls(audio=audio, text=text, **_known(cls, config, "model"))

    def to_dict(self) -> dict:
        """The nested dict that `from_dict` takes."""
        out = dataclasses.asdict(self)
        del out["remat"]
        if not self.classes:  # of a stream, not of a model on disk
            del out["classes"]
        if self.audio is not None:
            kind = next(k for k, (c, _) in AUDIO_TOWERS.items() if isinstance(self.audio, c))
            out["audio"] = {"kind": kind} | out["audio"]
        return out

    @property
    def towers(self) -> dict[str, Any]:
        """{'audio': configuration, 'text': configuration} of the towers that are there."""
        both = {"audio": self.audio, "text": self.text}
        return {side: config for side, config in both.items() if config is not None}

    @property
    def _compute_dtype(self):
        return jnp.dtype(self.dtype)

    def _audio_tower(self):
        kind = next(t for c, t in AUDIO_TOWERS.values() if isinstance(self.audio, c))
        return kind(self.audio, self._compute_dtype, self.remat)

    def _text_tower(self):
        return TextTower(self.text, self._compute_dtype, self.remat)

    def _head(self):
        return Head(self.embedding, self.head, self.head_activation)

    def input_shapes(self, batch: int, max_tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one batch as the encoders take it."""
        shape, shapes = jax.ShapeDtypeStruct, {}
        if self.audio is not None:
            shapes["audio"] = shape((batch, *self.audio.input_shape), jnp.float32)
        if self.text is not None:
            shapes |= {"token_ids": shape((batch, max_tokens), jnp.int32),
                       "token_mask": shape((batch, max_tokens), jnp.bool_)}
        return shapes

    def init(self, key: jax.Array) -> dict:
        """Random parameters in float32; the temperature starts at 1 / 0.07."""
        keys = jax.random.split(key, 4)
        blank = {k: jnp.zeros(s.shape, s.dtype) for k, s in self.input_shapes(1, 1).items()}
        make = lambda module, key, *args: module.init(key, *args)["params"]
        params = {}
        if self.audio is not None:
            params["audio"] = make(self._audio_tower(), keys[0], blank["audio"])
        if self.text is not None:
            params["text"] = make(self._text_tower(), keys[1], blank["token_ids"],
                                  jnp.ones_like(blank["token_mask"]))
        if len(self.towers) == 2:
            params["heads"] = {side: make(self._head(), key, jnp.zeros((1, _width(tower))))
                               for key, (side, tower) in zip(keys[2:], self.towers.items())}
            params["logit_scale"] = jnp.asarray(math.log(1 / 0.07), jnp.float32)
        if self.classes:  # zeros: every class is as likely, and the first gradient is the data's
            params["heads"] = {"classes": {"kernel": jnp.zeros((self.embedding, self.classes)),
                                           "bias": jnp.zeros(self.classes)}}
        return params

    def encode_audio(self, params: dict, tuning: dict | None, audio: jax.Array,
                     mask: jax.Array | None = None, *, key: jax.Array | None = None,
                     entering: tuple[int, jax.Array] | None = None) -> dict:
        """Audio [B, *input_shape] -> tokens, hidden, pooled, embedding [B, d] (unit rows).

        Audio is what the tower takes: log-mels [B, frames, mels] in the unit of its front end, or
        waveforms [B, samples] with a mask that is False on padding. A model with classes gives
        logits [B, C], too. `prompts` [B, n, d] is what a ViT makes of shallow prompts.

        `key` turns dropout on (training); without it the result is a function of each row alone.

        `entering`, (number, tokens [B, S, d]), are the inputs of that block (from 0) of an AST or
        EAT: the blocks before it are not run, nor is the audio read, and hidden begins with them.
        """
        more = {} if entering is None else {"entering": entering}
        out = _apply(self._audio_tower(), params["audio"], key, audio, mask,
                     (tuning or {}).get("audio"), **more)
        return self.project("audio", params, out)

    def encode_text(self, params: dict, tuning: dict | None, token_ids: jax.Array,
                    mask: jax.Array, *, key: jax.Array | None = None) -> dict:
        """Token ids and mask [B, N] -> tokens, hidden, pooled, embedding [B, d] (unit rows)."""
        out = _apply(self._text_tower(), params["text"], key, token_ids, mask,
                     (tuning or {}).get("text"))
        return self.project("text", params, out)

    def encode(self, side: str, params: dict, tuning: dict | None, batch: Mapping, *,
               key: jax.Array | None = None) -> dict:
        """`encode_audio` of a batch's audio (and audio_mask), or `encode_text` of its tokens.

        Where the batch has more of the audio tower, that is where it goes on: `pooled` [B, d], or
        `hidden_2` [B, S, d], the inputs of block 2 (or of another number).
        """
        if side == "audio":
            if "pooled" in batch:
                return self.project("audio", params, {"pooled": batch["pooled"]})
            for name in batch:
                if name.startswith(HIDDEN):
                    entering = int(name.removeprefix(HIDDEN)), batch[name]
                    return self.encode_audio(params, tuning, None, key=key, entering=entering)
            return self.encode_audio(params, tuning, batch["audio"], batch.get("audio_mask"),
                                     key=key)
        return self.encode_text(params, tuning, batch["token_ids"], batch["token_mask"], key=key)

    def project(self, side: str, params: dict, out: dict) -> dict:
        """A tower's outputs with what the heads make of `out["pooled"]`: embedding, logits."""
        x = out["pooled"].astype(jnp.float32)
        if len(self.towers) == 2:
            x = self._head().apply({"params": params["heads"][side]}, x)
        elif self.classes:
            head = params["heads"]["classes"]
            out = out | {"logits": x @ head["kernel"] + head["bias"]}
        return out | {"embedding": x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)}


def _apply(module, params, key, *args, **more):
    rngs = None if key is None else {"dropout": key}
    return module.apply({"params": params}, *args, key is None, rngs=rngs, **more)


def _width(tower) -> int:
    """Width of what a tower pools."""
    return tower.layer_widths[-1][1]


def _known(cls, values: dict, where: str) -> dict:
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; expected some of {names}")
    return values


def _build(cls, values: dict, where: str):
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**_known(cls, values, where))
