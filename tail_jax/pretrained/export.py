"""A dual encoder of HTSAT and RoBERTa as a CLAP folder that transformers loads."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from typing import Any

import safetensors.numpy

from data_pipelines.front_end import CLAP, CLAP_FUSED, FrontEnd
from data_pipelines.log_mel import LogMelSettings
from data_pipelines.text import Tokenizer
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.pretrained.clap import TABLE
from tail_jax.pretrained.names import unfill

# Ours -> theirs.
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
_FILLS = {"repeatpad": "repeatpad", "repeat": "repeat", "zeros": "pad"}
# The front end's settings that their feature extractor takes; it fixes the others.
_SETTINGS = {"sampling_rate": "sampling_rate", "hop_length": "hop_length",
             "n_mels": "feature_size", "n_fft": "fft_window_size", "fmin": "frequency_min",
             "fmax": "frequency_max"}


def export_clap(model: DualEncoder, params: Any, front_end: FrontEnd, tokenizer: Tokenizer,
                directory, max_tokens: int | None = None) -> pathlib.Path:
    """Writes config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.

    transformers' `ClapModel` and `ClapProcessor` load the folder (`from_pretrained`) and give equal
    embeddings and logits. Everything is written aside and renamed in the end.

    Args:
        model, params: with both towers.
        front_end: how its audio is made.
        tokenizer: of its texts.
        directory: new, or an empty folder.
        max_tokens: what longer texts are cut to; None is what the position table holds.

    Returns:
        The folder.

    Raises:
        ValueError: on what that layout cannot hold, or a folder that is not empty.
    """
    directory = pathlib.Path(directory)
    _check(model, front_end, tokenizer)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: exists and is not an empty folder; export to a new one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.tmp")
    aside.mkdir()
    try:
        safetensors.numpy.save_file(unfill(TABLE, params), aside / "model.safetensors",
                                    {"format": "pt"})
        for name, content in (("config.json", _config(model, tokenizer)),
                              ("preprocessor_config.json", _preprocessor(front_end))):
            (aside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer.export(aside, max_tokens or model.text.max_tokens)
        os.replace(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def _check(model: DualEncoder, front_end: FrontEnd, tokenizer: Tokenizer) -> None:
    if not isinstance(model.audio, HTSATConfig) or model.text is None:
        kinds = [type(tower).__name__ for tower in model.towers.values()]
        raise ValueError(f"a model of {' and '.join(kinds)} cannot be a CLAP folder; expected "
                         "HTSATConfig and TextConfig")
    text, settings = model.text, front_end.settings
    if not isinstance(settings, LogMelSettings):
        raise ValueError("a front end of waveforms cannot be a CLAP folder's; expected log-mels")
    published = CLAP_FUSED if model.audio.fusion else CLAP
    fixed = [f.name for f in dataclasses.fields(settings) if f.name not in (*_SETTINGS, "fill")]
    for what, found, only in (
            ("model.head", model.head, ("mlp",)), ("text pool", text.pool, ("pooler",)),
            ("text positions", text.positions, ("tokens",)),
            ("text position_offset", text.position_offset, (tokenizer.pad_id + 1,)),
            # Theirs has one size of window for all stages, and bias tables of that size.
            ("HTSAT's window", model.audio.window,
             (min(model.audio.window, *model.audio.grids[-1]),)),
            ("front end's fusion", front_end.fusion, (model.audio.fusion,)),
            ("front end's window", front_end.window_seconds, (round(front_end.window_seconds),)),
            ("front end's fill", settings.fill, _FILLS),
            *((f"front end's {name}", getattr(settings, name), (getattr(published, name),))
              for name in fixed)):
        if found not in only:
            raise ValueError(f"{what} is {found!r}, which a CLAP folder cannot say; expected "
                             f"{' or '.join(map(repr, only))}")
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
                         f"{text.vocab_size}; they do not belong together")


def _config(model: DualEncoder, tokenizer: Tokenizer) -> dict:
    audio, text = model.audio, model.text
    pair = lambda value: list(value) if isinstance(value, tuple) else value
    head = {"projection_dim": model.embedding,
            "projection_hidden_act": _ACTIVATIONS[model.head_activation]}
    return {
        "model_type": "clap", "architectures": ["ClapModel"], "dtype": "float32", **head,
        "text_config": {
            "model_type": "clap_text_model", **head, "vocab_size": text.vocab_size,
            "hidden_size": text.width, "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads, "intermediate_size": text.hidden,
            "max_position_embeddings": text.max_positions,
            "type_vocab_size": text.type_vocab_size, "layer_norm_eps": text.epsilon,
            "hidden_act": _ACTIVATIONS[text.activation], "pad_token_id": tokenizer.pad_id,
            "bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id},
        "audio_config": {
            "model_type": "clap_audio_model", **head, "spec_size": audio.spec_size,
            "num_mel_bins": audio.mels, "patch_size": pair(audio.patch),
            "patch_stride": list(audio.steps), "patch_embeds_hidden_size": audio.width,
            "hidden_size": audio.layer_widths[-1][1], "depths": list(audio.depths),
            "num_hidden_layers": len(audio.depths), "num_attention_heads": list(audio.heads),
            "window_size": audio.window, "mlp_ratio": audio.mlp_ratio,
            "layer_norm_eps": audio.epsilon, "hidden_act": _ACTIVATIONS[audio.activation],
            "qkv_bias": audio.qkv_bias, "enable_patch_layer_norm": audio.patch_norm,
            "enable_fusion": audio.fusion, "aff_block_r": audio.fusion_ratio,
            **({"fusion_type": "aff_2d"} if audio.fusion else {})}}


def _preprocessor(front_end: FrontEnd) -> dict:
    settings = front_end.settings
    return {
        "feature_extractor_type": "ClapFeatureExtractor", "processor_class": "ClapProcessor",
        "max_length_s": round(front_end.window_seconds),
        "truncation": "fusion" if front_end.fusion else "rand_trunc",
        "padding": _FILLS[settings.fill],
        **{theirs: getattr(settings, ours) for ours, theirs in _SETTINGS.items()}}
