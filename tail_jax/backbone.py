"""Backbones: a described model, its parameters, tokenizer and front end, and their files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.training.checkpoints import check_same_structure, load_tree, save_tree, tree_hash

WEIGHTS, TOKENIZER = "backbone.safetensors", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A dual encoder with everything needed to feed it.

    Attributes:
        name: for people.
        model: the description; its methods are the encoders.
        params: NumPy tree.
        front_end: the data settings its inputs were made with (log-mel, window, tokens).
        tokenizer: path of its tokenizer.json.
        sha256: of the parameters (`checkpoints.tree_hash`).
    """

    name: str
    model: DualEncoder
    params: dict
    front_end: dict
    tokenizer: pathlib.Path
    sha256: str


def front_end_of(data: dict) -> dict:
    """The part of the data settings that a backbone is tied to."""
    return {k: data[k] for k in ("log_mel", "window_seconds", "max_tokens")}


def save_backbone(directory, name: str, model: DualEncoder, params: dict, front_end: dict,
                  tokenizer) -> Backbone:
    """Writes a backbone folder (weights last, so that a folder with weights is whole)."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, target = pathlib.Path(tokenizer), directory / TOKENIZER
    if tokenizer != target:
        shutil.copyfile(tokenizer, target.with_suffix(".aside"))
        os.replace(target.with_suffix(".aside"), target)
    header = {"kind": "backbone", "name": name, "model": model.to_dict(), "front_end": front_end,
              "sha256": tree_hash(params)}
    save_tree(directory / WEIGHTS, params, header)
    return load_backbone(directory)


def load_backbone(directory) -> Backbone:
    """The backbone in a folder that `save_backbone` (or a run's `backbone/`) wrote.

    Raises:
        ValueError: if the folder or a file is missing, damaged, or of another model.
    """
    directory = pathlib.Path(directory)
    params, header = load_tree(directory / WEIGHTS)
    if header.get("kind") != "backbone":
        raise ValueError(f"{directory / WEIGHTS}: holds {header.get('kind')!r}, not a backbone")
    if not (directory / TOKENIZER).is_file():
        raise ValueError(f"{directory}: has no {TOKENIZER}; copy the whole backbone folder")
    model = DualEncoder.from_dict(header["model"])
    check_same_structure(jax.eval_shape(model.init, jax.random.key(0)), params,
                         str(directory / WEIGHTS))
    if tree_hash(params) != header["sha256"]:
        raise ValueError(f"{directory / WEIGHTS}: the values are not those that were saved, the "
                         "file is damaged; copy it again")
    return Backbone(header["name"], model, params, header["front_end"], directory / TOKENIZER,
                    header["sha256"])


def random_backbone(model: DualEncoder, seed: int, front_end: dict, tokenizer,
                    mel_mean: np.ndarray, mel_var: np.ndarray) -> Backbone:
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
    return Backbone("random", model, params, front_end, pathlib.Path(tokenizer), tree_hash(params))


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


def content_hash(*parts: Any) -> str:
    """Twelve hex digits of a hash over JSON-able parts."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
