"""Audio Spectrogram Transformer (Gong et al. 2021) in the Hugging Face layout."""

from __future__ import annotations

import dataclasses

from data_pipelines.front_end import KALDI, FrontEnd
from tail_jax.models.ast import ASTConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.transformer import BlockConfig
from tail_jax.pretrained import Description
from tail_jax.pretrained.bert import ACTIVATIONS
from tail_jax.pretrained.files import Options, Tensors
from tail_jax.pretrained.names import NameTable, under

AST = (
    ("cls", "embeddings.cls_token"), ("dist", "embeddings.distillation_token"),
    ("position", "embeddings.position_embeddings"),
    ("patch", "embeddings.patch_embeddings.projection"), ("norm", "layernorm"),
    *under(r"encoder/layer_(\d+)", "layers.<1>.", (
        ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
        ("query", "attention.q_proj"), ("key", "attention.k_proj"), ("value", "attention.v_proj"),
        ("out", "attention.o_proj"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))))
# The spelling before transformers 5, which is that of the published files, becomes the one above.
ALIASES = (
    (r"^audio_spectrogram_transformer\.", ""), (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2."))
TABLE = NameTable("AST", under("audio", "", AST), ALIASES, ignored=(r"classifier\..*",))


def describe(options: Options, preprocessor: Options, tensors: Tensors) -> Description:
    """An audio model whose vectors are means of its two class tokens.

    Raises:
        ValueError: on an option that is not supported, or files that do not belong together.
    """
    del tensors
    width, heads = options.count("hidden_size", 768), options.count("num_attention_heads", 12)
    options.build(BlockConfig, width=width, heads=heads, hidden=width)
    audio = options.build(
        ASTConfig, frames=options.count("max_length", 1024),
        mels=options.count("num_mel_bins", 128), patch=options.count("patch_size", 16),
        stride=(options.count("frequency_stride", 10), options.count("time_stride", 10)),
        width=width, heads=heads, layers=options.count("num_hidden_layers", 12),
        hidden=options.count("intermediate_size", 3072),
        activation=options.choose("hidden_act", "gelu", ACTIVATIONS),
        qkv_bias=options.choose("qkv_bias", True, {True: True, False: False}),
        epsilon=options.number("layer_norm_eps", 1e-12, 0))
    # A folder without the file has the values of AudioSet, as every default here.
    for name, only in (("max_length", audio.frames), ("num_mel_bins", audio.mels)):
        preprocessor.choose(name, only, {only: None})
    preprocessor.choose("sampling_rate", KALDI.sampling_rate, {KALDI.sampling_rate: None})
    mean, std = preprocessor.number("mean", -4.2677393), preprocessor.number("std", 4.5689974)
    if not preprocessor.choose("do_normalize", True, {True: True, False: False}):
        mean, std = 0.0, 0.5  # (x - mean) / (2 std) = x
    table = dataclasses.replace(
        TABLE, constants={"audio/input_mean": mean, "audio/input_std": std})
    settings = dataclasses.replace(KALDI, n_mels=audio.mels, frames=audio.frames)
    samples = settings.frame_length + (audio.frames - 1) * settings.hop_length
    return Description(DualEncoder(audio=audio, text=None),
                       FrontEnd(settings, samples / settings.sampling_rate), table)
