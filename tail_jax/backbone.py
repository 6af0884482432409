"""Backbones: a described model, its parameters, tokenizer and front end, and their files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np

from data_pipelines.front_end import FrontEnd
from data_pipelines.log_mel import LogMelSettings
from data_pipelines.text import Tokenizer
from tail_jax import methods, pretrained
from tail_jax.embedding import TEMPLATE, Embeddings
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.pretrained import find_tokenizer
from tail_jax.pretrained.files import open_tensors
from tail_jax.training.checkpoints import check_same_structure, load_tree, save_tree, tree_hash

WEIGHTS, TOKENIZER = "backbone.safetensors", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A pretrained model with everything needed to feed it.

    Attributes:
        name: for people.
        model: the description; its methods are the encoders.
        params: NumPy tree.
        front_end: from a clip to the model's input; None for a model of text alone.
        max_tokens: longest text, begin and end included; 0 for a model of audio alone.
        tokenizer: its tokenizer.json, or a folder with vocabulary files; None without one.
        tuning: what a method learned beside the parameters, as the encoders take it, or None.
        encoders: {audio, text}: functions (params, tuning, input, mask) -> outputs of a method
            that does more than the model's own; None otherwise.
        stored_hash: the hash that came with the parameters; empty where none did.
    """

    name: str
    model: DualEncoder
    params: dict
    front_end: FrontEnd | None
    max_tokens: int
    tokenizer: pathlib.Path | None
    tuning: dict | None = None
    encoders: dict | None = None
    stored_hash: str = ""

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the parameters (`checkpoints.tree_hash`)."""
        return self.stored_hash or tree_hash(self.params)

    def with_classes(self, count: int) -> Backbone:
        """Its audio tower with a classifier of zeros for `count` classes; the hash stays its own.

        Raises:
            ValueError: if it has no audio tower.
        """
        if self.model.audio is None:
            raise ValueError(f"{self.name} has no audio tower; expected a backbone with one")
        model = DualEncoder(self.model.audio, None, dtype=self.model.dtype, classes=count)
        head = jax.eval_shape(model.init, jax.random.key(0))["heads"]
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), head)
        return dataclasses.replace(
            self, model=model, params={"audio": self.params["audio"], "heads": zeros},
            tokenizer=None, stored_hash=self.sha256)

    @functools.cached_property
    def embeddings(self) -> Embeddings:
        """The model on the device, ready to embed; made on first use."""
        return Embeddings(self.model, self.params, self.front_end, self.tokenizer, self.max_tokens,
                          self.name, self.tuning, self.encoders)

    def embed_audio(self, clips, sampling_rate=None, policy: str | None = None,
                    **options) -> np.ndarray:
        """Unit embeddings of clips (paths or arrays), [n, d]; see `Embeddings.embed_audio`."""
        return self.embeddings.embed_audio(clips, sampling_rate, policy, **options)

    def embed_text(self, texts, **options) -> np.ndarray:
        """Unit embeddings of texts, [n, d]; see `Embeddings.embed_text`."""
        return self.embeddings.embed_text(texts, **options)

    def classify(self, clips, class_names, template: str = TEMPLATE, **options) -> np.ndarray:
        """Probabilities of classes given by name, [n, classes]; see `Embeddings.classify`."""
        return self.embeddings.classify(clips, class_names, template, **options)

    def prepare_audio(self, clips, sampling_rate=None, policy: str | None = None):
        """(audio, mask) as `encode_audio` takes them; see `Embeddings.prepare_audio`."""
        return self.embeddings.prepare_audio(clips, sampling_rate, policy)

    def prepare_text(self, texts):
        """(token ids, mask) as `encode_text` takes them; see `Embeddings.prepare_text`."""
        return self.embeddings.prepare_text(texts)

    def encode_audio(self, audio, mask=None) -> dict:
        """Tokens and all layers of prepared rows; see `Embeddings.encode_audio`."""
        return self.embeddings.encode_audio(audio, mask)

    def encode_text(self, token_ids, mask) -> dict:
        """Tokens and all layers of token ids and mask; see `Embeddings.encode_text`."""
        return self.embeddings.encode_text(token_ids, mask)


def front_end_of(data: dict) -> tuple[FrontEnd, int]:
    """The part of the data settings that a backbone is tied to: front end and longest text."""
    return (FrontEnd(LogMelSettings(**data["log_mel"]), data["window_seconds"]),
            data["max_tokens"])


def load(path, tuning=None, dtype: str | None = None) -> Backbone:
    """The model in a checkpoint.

    Args:
        path: a folder in the Hugging Face layout (CLAP, AST, BERT, RoBERTa, wav2vec 2.0,
            data2vec-audio, EAT), a weight file of LAION CLAP, MS-CLAP 2022 or EAT, or a backbone
            folder of this project.
        tuning: a `tuning/task_K.safetensors` of a run on this checkpoint, to embed with what it
            learned.
        dtype: 'float32' or 'bfloat16', of the towers' computation; by default the checkpoint's.

    Raises:
        ValueError: if anything is missing, damaged, unknown, or does not belong together.
    """
    path = pathlib.Path(path)
    if path.is_dir() and (path / WEIGHTS).is_file():
        backbone = _load_own(path)
    else:
        description, params = pretrained.load(path)
        folder = path if path.is_dir() else path.parent
        backbone = Backbone(path.resolve().name, description.model, params, description.front_end,
                            description.max_tokens, find_tokenizer(folder))
    if dtype is not None:
        backbone = dataclasses.replace(
            backbone, model=dataclasses.replace(backbone.model, dtype=dtype))
    return backbone if tuning is None else tuned(backbone, tuning)


def describe(path) -> tuple[DualEncoder, FrontEnd | None, int]:
    """(model, front end, longest text) of a checkpoint; reads no weights. Raises as `load`."""
    path = pathlib.Path(path)
    if path.is_dir() and (path / WEIGHTS).is_file():
        return _header(open_tensors(path / WEIGHTS).extras.get("tail_jax", "{}"), path / WEIGHTS)
    description, _ = pretrained.describe(path)
    return description.model, description.front_end, description.max_tokens


def save_backbone(directory, backbone: Backbone) -> Backbone:
    """Writes a backbone folder (weights last, so that a folder with weights is whole)."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if backbone.tokenizer is not None and backbone.tokenizer != directory / TOKENIZER:
        Tokenizer.load(backbone.tokenizer).save(directory / TOKENIZER)
    header = {"kind": "backbone", "name": backbone.name, "model": backbone.model.to_dict(),
              "front_end": backbone.front_end and backbone.front_end.to_dict(),
              "max_tokens": backbone.max_tokens, "tokenizer": backbone.tokenizer is not None,
              "sha256": backbone.sha256}
    save_tree(directory / WEIGHTS, backbone.params, header)
    return load(directory)


def _header(text: str, path: pathlib.Path) -> tuple[DualEncoder, FrontEnd | None, int]:
    header = json.loads(text)
    if header.get("kind") != "backbone":
        raise ValueError(f"{path}: holds {header.get('kind')!r}, not a backbone")
    front_end = header["front_end"]
    return (DualEncoder.from_dict(header["model"]),
            front_end and FrontEnd.from_dict(front_end), header["max_tokens"])


def _load_own(directory: pathlib.Path) -> Backbone:
    path = directory / WEIGHTS
    params, header = load_tree(path)
    model, front_end, max_tokens = _header(json.dumps(header), path)
    if header["tokenizer"] and not (directory / TOKENIZER).is_file():
        raise ValueError(f"{directory}: has no {TOKENIZER}; copy the whole backbone folder")
    check_same_structure(jax.eval_shape(model.init, jax.random.key(0)), params, str(path))
    if tree_hash(params) != header["sha256"]:
        raise ValueError(f"{path}: the values are not those that were saved, the file is damaged; "
                         "copy it again")
    return Backbone(header["name"], model, params, front_end, max_tokens,
                    directory / TOKENIZER if header["tokenizer"] else None,
                    stored_hash=header["sha256"])


def combine(audio: Backbone, text: Backbone, embedding: int, seed: int) -> Backbone:
    """A dual encoder of the audio tower of one checkpoint and the text tower of another.

    The projection heads and the temperature are new, drawn from `seed`.

    Raises:
        ValueError: if a tower is not there.
    """
    for side, backbone in (("audio", audio), ("text", text)):
        if side not in backbone.model.towers:
            raise ValueError(f"{backbone.name} has no {side} tower; name the checkpoint with the "
                             "audio tower first, then the one with the text tower")
    model = DualEncoder(audio.model.audio, text.model.text, embedding)
    fresh = jax.device_get(jax.jit(model.init)(jax.random.key(seed)))
    params = fresh | {"audio": audio.params["audio"], "text": text.params["text"]}
    return Backbone(f"{audio.name}+{text.name}", model, params, audio.front_end, text.max_tokens,
                    text.tokenizer)


def random_backbone(model: DualEncoder, seed: int, data: dict, tokenizer, mel_mean: np.ndarray,
                    mel_var: np.ndarray) -> Backbone:
    """Untrained parameters whose input statistics fit data of that mean and variance a mel band."""
    params = jax.device_get(jax.jit(model.init)(jax.random.key(seed)))
    if "input_norm" in params["audio"]:
        params["audio"]["input_norm"] |= {
            "running_mean": np.asarray(mel_mean, np.float32),
            "running_var": np.asarray(mel_var, np.float32)}
    else:  # AST divides by 2 std, over all bands
        total = mel_var.mean() + mel_mean.var()
        params["audio"] |= {"input_mean": np.asarray(mel_mean.mean(), np.float32),
                            "input_std": np.asarray(total**0.5 / 2, np.float32)}
    return Backbone("random", model, params, *front_end_of(data),
                    tokenizer and pathlib.Path(tokenizer))


def load_tuning(path, backbone: Backbone | None = None) -> tuple[Any, dict]:
    """(trainable tree, header) of a run's `tuning/task_K.safetensors`.

    With a backbone, its hash is compared with the one the tree was trained beside.

    Raises:
        ValueError: on a missing or damaged file, or if the backbone is another one.
    """
    tree, header = load_tree(path)
    if header.get("kind") != "tuning":
        raise ValueError(f"{path}: holds {header.get('kind')!r}, not a tuning tree")
    if backbone is not None and header["backbone_sha256"] != backbone.sha256:
        raise ValueError(f"{path}: trained beside backbone {header['backbone_sha256'][:12]}, got "
                         f"{backbone.sha256[:12]}; load the backbone named in its header")
    return tree, header


def tuned(backbone: Backbone, path) -> Backbone:
    """The backbone with what a run's tuning file holds. Raises as `load_tuning`."""
    tree, header = load_tuning(path, backbone)
    if classes := header.get("model", {}).get("classes"):
        raise ValueError(f"{path}: of a class-incremental run ({classes} "
                         "classes), which cannot be embedded with yet; measure it with `python -m "
                         "tail_jax.evaluate --workdir=DIR`")
    method = methods.build(header["method"])
    state = method.restored(tree)
    trainable, aux = state["trainable"], state["aux"]
    params, tuning = method.resolve(backbone.model, trainable, method.frozen(backbone.params))
    encoders = None
    if method.own_encode:
        # Routes and queries were learned beside the heads that the backbone came with.
        tuning = {"trainable": trainable, "aux": aux, "heads": backbone.params["heads"]}
        encoders = {side: _encoder(method, backbone.model, side) for side in ("audio", "text")}
    return dataclasses.replace(backbone, params=params, tuning=tuning, encoders=encoders,
                               stored_hash="", name=f"{backbone.name}, {pathlib.Path(path).name}")


def _encoder(method, model, side: str):
    """`method.encode` in the form of the model's own encoders."""
    keys = {"audio": ("audio", "audio_mask"), "text": ("token_ids", "token_mask")}[side]

    def encode(params, tuning, *inputs):
        return method.encode(side, model, tuning["trainable"], params | {"heads": tuning["heads"]},
                             tuning["aux"], dict(zip(keys, inputs)))

    return encode


def content_hash(*parts: Any) -> str:
    """Twelve hex digits of a hash over JSON-able parts."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
