"""Checkpoints of other projects: one file a kind, each with its name table and its configuration.

    files.py    weight files as named arrays; configuration files as `Options`
    names.py    name tables, and parameters filled from them
    KIND.py     `describe(config, preprocessor, tensors)`: the model, its front end and its names

A new kind is a file with `describe` and an entry below.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from typing import Any

import jax

from tail_jax.pretrained.files import Options, Tensors, open_tensors, read_json
from tail_jax.pretrained.names import NameTable, fill

# config.json's model_type -> module here.
MODEL_TYPES = {
    "clap": "clap", "audio-spectrogram-transformer": "ast", "bert": "bert", "roberta": "bert",
    "wav2vec2": "wav2vec2", "data2vec-audio": "wav2vec2", "eat": "eat"}
# Files without a configuration: the module, and a key (after any prefix) that only this kind has.
SIGNATURES = {
    "laion_clap": "audio_branch.patch_embed.proj.weight",
    "ms_clap": "audio_encoder.base.conv_block1.conv1.weight",
    "eat": "modality_encoders.IMAGE.local_encoder.proj.weight"}
# The same options; transformers 5 writes them into the second file when it saves a processor.
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint is, before its weights are read.

    Attributes:
        model: the `DualEncoder`, or any other description with `init`.
        front_end: how audio becomes its input (`data_pipelines.front_end.FrontEnd`); None for
            models of text alone.
        table: names of its weights.
        max_tokens: longest text it takes, begin and end included; 0 for models of audio alone.
    """

    model: Any
    front_end: Any
    table: NameTable
    max_tokens: int = 0


def describe(path) -> tuple[Description, Tensors]:
    """What lies in a checkpoint folder (Hugging Face layout) or weight file; reads no weights.

    Raises:
        ValueError: not a checkpoint, one of an unknown kind, or with an option that is not
            supported.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; expected a checkpoint")
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    tensors = open_tensors(path)
    if config.is_file():
        options = Options(read_json(config), config)
        kind = options.get("model_type", "")
        if kind not in [*MODEL_TYPES]:  # it may be of any type
            raise ValueError(f"{config}: model_type is {kind!r}; supported: "
                             f"{', '.join(MODEL_TYPES)}")
        module = MODEL_TYPES[kind]
    else:
        options = Options({}, path)
        module = next((name for name, key in SIGNATURES.items()
                       if any(k == key or k.endswith("." + key) for k in tensors.shapes)), None)
        if module is None:
            raise ValueError(
                f"{folder}: has no config.json, and {tensors.path.name} is none of the layouts "
                f"that are known without one ({', '.join(SIGNATURES)}); copy config.json too")
    kind = importlib.import_module(f"tail_jax.pretrained.{module}")
    return kind.describe(options, _preprocessor(folder), tensors), tensors


def _preprocessor(folder: pathlib.Path) -> Options:
    """How a folder prepares audio; empty where it does not say."""
    path, processor = folder / PREPROCESSOR, folder / PROCESSOR
    if path.is_file() or not processor.is_file():
        return Options(read_json(path) if path.is_file() else {}, path)
    return Options(read_json(processor), processor).section("feature_extractor")


def load(path) -> tuple[Description, Any]:
    """(description, parameters as a NumPy tree) of a checkpoint folder or weight file.

    Raises:
        ValueError: as `describe`, and if weights and configuration do not belong together.
    """
    description, tensors = describe(path)
    shapes = jax.eval_shape(description.model.init, jax.random.key(0))
    return description, fill(description.table, shapes, tensors)


def find_tokenizer(folder) -> pathlib.Path | None:
    """What `Tokenizer.load` takes of a checkpoint folder: its tokenizer.json, the folder itself
    where that holds vocabulary files, or None."""
    folder = pathlib.Path(folder)
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    names = ({"vocab.json", "merges.txt"}, {"vocab.txt"})
    return folder if any(all((folder / n).is_file() for n in group) for group in names) else None
