"""EAT and SSLAM checkpoints: fairseq's layout (.pt) and that of the Hugging Face hub.

| | fairseq, pretrained | fairseq, fine-tuned | Hugging Face |
|---|---|---|---|
| stem | modality_encoders.IMAGE. | model.modality_encoders.IMAGE. | model. |
| first norm | ...context_encoder.norm | ...context_encoder.norm | model.pre_norm |
| blocks | blocks.N. | model.blocks.N. | model.blocks.N. |
| more | decoder, _ema | fc_norm, head | fc_norm, head |

Decoder, teacher (`_ema`) and classifier are left out; features come from the student, as in EAT's
own feature extraction. Positions are computed here, and a file's own are compared with them.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np

from data_pipelines.front_end import KALDI, FrontEnd
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig, sincos_positions
from tail_jax.models.transformer import BlockConfig
from tail_jax.pretrained import Description
from tail_jax.pretrained.files import Options, Tensors
from tail_jax.pretrained.names import NameTable, under

# (mean, standard deviation) of the log-mels of AudioSet, and of the corpora that EAT fine-tunes on.
AUDIOSET, ESC50, SPEECH_COMMANDS = (-4.268, 4.569), (-6.627, 5.359), (-6.846, 5.565)
ALIASES = ((r"^model\.", ""), (r"^modality_encoders\.IMAGE\.context_encoder\.norm\.", "pre_norm."),
           (r"^modality_encoders\.IMAGE\.", ""))
POSITIONS = "fixed_positional_encoder.positions"
BLOCK = r"encoder/layer_(\d+)"
RULES = (
    ("patch", "local_encoder.proj"), ("cls", "extra_tokens"), ("norm", "pre_norm"),
    *((f"{BLOCK}/{ours}", f"blocks.<1>.{theirs}") for ours, theirs in {
        "query": "attn.qkv[0/3]", "key": "attn.qkv[1/3]", "value": "attn.qkv[2/3]",
        "out": "attn.proj", "norm1": "norm1", "norm2": "norm2", "up": "mlp.fc1",
        "down": "mlp.fc2"}.items()))
IGNORED = (re.escape(POSITIONS), r"(shared_)?decoder\..*", r"_ema\..*", r"(recon|cls)_proj\..*",
           r"center", r"fc_norm\..*", r"head\..*")


def describe(config: Options, preprocessor: Options, tensors: Tensors) -> Description:
    """An EAT encoder: its configuration, or, in a fairseq file, the shapes of its weights.

    Raises:
        ValueError: an option that is not supported, or positions that are not EAT's.
    """
    del preprocessor  # no layout has one; the statistics of the input are constants of EAT's code
    keys = {functools.reduce(lambda name, alias: re.sub(*alias, name), ALIASES, key): key
            for key in tensors.shapes}
    try:
        if config.get("model_type") == "eat":
            audio, statistics = _from_config(config), AUDIOSET
        else:
            audio, statistics = _from_weights(
                {name: tensors.shapes[key] for name, key in keys.items()}, tensors)
        BlockConfig(audio.width, audio.heads, audio.hidden)  # compares width and heads
    except (TypeError, ValueError) as error:
        named = "" if str(config.path) in str(error) else f"{config.path}: "
        raise ValueError(f"{named}{error}") from None
    # Where the width is another, the shapes of the weights say so better.
    if POSITIONS in keys and tensors.shapes[keys[POSITIONS]][-1] == audio.width:
        _check_positions(tensors, keys[POSITIONS], audio)
    settings = dataclasses.replace(KALDI, n_mels=audio.mels, frames=audio.frames)
    samples = settings.frame_length + (audio.frames - 1) * settings.hop_length
    table = NameTable("EAT", under("audio", "", RULES), ALIASES, IGNORED, constants=dict(
        zip(("audio/input_mean", "audio/input_std"), statistics)))
    return Description(DualEncoder(audio, None), FrontEnd(settings, samples / settings.sampling_rate), table)


def _from_config(config: Options) -> EATConfig:
    """Of a config.json, which leaves out what has the base size."""
    _check_architecture(config)
    patch, width = config.count("patch_size", 16), config.count("embed_dim", 768)
    config.choose("stride", patch, {patch: None})
    config.choose("in_chans", 1, {1: None})
    config.choose("qkv_bias", True, {True: None})
    config.choose("fixed_positions", True, {True: None})
    size = config.get("img_size", (1024, 128))
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError(f"{config.path}: option img_size is {size!r}; expected [frames, mels]")
    frames, mels = (Options({"img_size": n}, config.path).count("img_size", 1) for n in size)
    config.choose("mel_bins", 128, {mels: None})
    return EATConfig(
        frames=frames, mels=mels, patch=patch, width=width, layers=config.count("depth", 12),
        heads=config.count("num_heads", 12),
        hidden=int(width * config.number("mlp_ratio", 4.0, 1 / width)),
        epsilon=config.number("norm_eps", 1e-6, 0))


def _from_weights(shapes: dict, tensors: Tensors) -> tuple[EATConfig, tuple[float, float]]:
    """Of the shapes of a fairseq file, and of the settings of its training where it has them.

    Fine-tuning keeps the settings of the pretraining below its own.
    """
    training = Options(tensors.extras.get("cfg") or {}, f"{tensors.path}: cfg")
    own = training.section("model")
    pretraining = own.section("pretrained_model_args").section("model")
    settings = pretraining if pretraining.values else own
    _check_architecture(settings)
    try:
        width, _, patch, _ = shapes["local_encoder.proj.weight"]
        hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError):
        raise ValueError(
            f"{tensors.path}: not a whole EAT checkpoint; expected local_encoder.proj.weight "
            "[width, 1, patch, patch] and blocks.0.mlp.fc1.weight") from None
    layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    mels = 128
    frames = own.count("target_length", training.section("task").count("target_length", 1024))
    if POSITIONS in shapes:  # those of newer files reach to two minutes
        frames = min(frames, shapes[POSITIONS][-2] // (mels // patch) * patch)
    statistics = next((s for name, s in (("esc50_eval", ESC50), ("spcv2_eval", SPEECH_COMMANDS))
                       if own.get(name)), AUDIOSET)
    return EATConfig(
        frames=frames, mels=mels, patch=patch, width=width, layers=layers,
        heads=settings.count("num_heads", max(width // 64, 1)), hidden=hidden,
        epsilon=settings.number("norm_eps", 1e-6, 0)), statistics


def _check_architecture(options: Options) -> None:
    options.choose("layer_norm_first", False, {False: None})
    options.choose("norm_affine", True, {True: None})


def _check_positions(tensors: Tensors, key: str, audio: EATConfig) -> None:
    theirs = tensors.read(key).reshape(-1, audio.width)
    mels = audio.grid[1]
    rows = len(theirs) // mels
    ours = sincos_positions((rows, mels), audio.width)
    # They are float32 from angles of up to a thousand radians.
    if theirs.shape != ours.shape or np.abs(theirs - ours).max() > 1e-3:
        raise ValueError(
            f"{tensors.path}: {key} {list(tensors.shapes[key])} are not the sine-cosine positions "
            f"of {rows} by {mels} patches and width {audio.width}; only EAT's fixed positions are "
            "supported, over 128 mels where no configuration says otherwise")
