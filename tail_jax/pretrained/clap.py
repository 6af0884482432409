"""CLAP (Wu et al. 2023) in the Hugging Face layout: HTSAT, RoBERTa, two heads; fused or not."""

from __future__ import annotations

import dataclasses

from data_pipelines.front_end import CLAP, CLAP_FUSED, FrontEnd
from data_pipelines.log_mel import LogMelSettings
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.models.transformer import BlockConfig
from tail_jax.pretrained import Description
from tail_jax.pretrained.bert import (ACTIVATIONS, DENSE, TEXT, TEXT_BUFFERS, max_tokens,
                                      text_config)
from tail_jax.pretrained.files import Options, Tensors
from tail_jax.pretrained.names import NameTable, under


def htsat(input_norm: str, block) -> tuple[tuple, ...]:
    """Rules of an HTSAT: `input_norm` there, and the rules of one Swin block."""
    return (
        ("input_norm", input_norm), ("patch", "patch_embed.proj"),
        ("patch_norm", "patch_embed.norm"), ("norm", "norm"),
        # Merging two stages belongs to the first of them there, to the second here.
        (r"merge_(\d+)", "layers.<1-1>.downsample.reduction"),
        (r"merge_norm_(\d+)", "layers.<1-1>.downsample.norm"),
        *under(r"stage_(\d+)_(\d+)", "layers.<1>.blocks.<2>.", block),
        ("fusion/patch", "patch_embed.mel_conv2d"),
        # Both branches are Conv, BatchNorm, ReLU, Conv, BatchNorm; a mean precedes the global one.
        *((f"fusion/{branch}_{layer}_{i}",
           f"patch_embed.fusion_model.{branch}_att.{first + 3 * i + (layer == 'norm')}")
          for first, branch in enumerate(("local", "global"))
          for layer in ("conv", "norm") for i in (0, 1)))


HTSAT = htsat("batch_norm", (
    ("relative_position_bias", "attention.self.relative_position_bias_table"),
    *under("block", "", (("norm1", "layernorm_before"), ("norm2", "layernorm_after"), *DENSE))))
# Arrays that are counted out, not learnt.
BUFFERS = (TEXT_BUFFERS, r".*\.relative_position_index", r".*\.num_batches_tracked")
# One temperature here; theirs has one a direction of the loss.
TEMPERATURE = ("logit_scale", ("logit_scale_a", "logit_scale_t"),
               (lambda audio, text: audio, lambda scale: (scale, scale)))
TABLE = NameTable(
    "CLAP", (
        *under("audio", "audio_model.audio_encoder.", HTSAT), *under("text", "text_model.", TEXT),
        (r"heads/(audio|text)/(linear\d)", "<1:s>_projection.<2:s>"), TEMPERATURE),
    aliases=((r"^clap\.", ""),), ignored=BUFFERS)


def describe(options: Options, preprocessor: Options, tensors: Tensors) -> Description:
    """A dual encoder as config.json and preprocessor_config.json say.

    Rates of dropout and of initialisation belong to the training that was; they are left.

    Raises:
        ValueError: on an option that is not supported, or files that do not belong together.
    """
    del tensors
    audio = audio_config(options.section("audio_config"))
    text = text_config(options.section("text_config"), "clap", "pooler")
    model = options.build(
        DualEncoder, audio=audio, text=text, embedding=options.count("projection_dim", 512),
        head_activation=options.choose("projection_hidden_act", "relu", ACTIVATIONS))
    return Description(model, front_end(preprocessor, audio), TABLE,
                       max_tokens(options.path.parent, text.max_tokens))


def audio_config(options: Options) -> HTSATConfig:
    """The HTSAT of a section `audio_config`.

    Raises:
        ValueError: on an option that is not supported.
    """
    # With another value transformers cannot compute either.
    options.choose("patch_embed_input_channels", 1, {1: 1})
    options.choose("flatten_patch_embeds", True, {True: True})
    fusion = options.choose("enable_fusion", False, {True: True, False: False})
    if fusion:
        options.choose("fusion_type", None, {None: None, "aff_2d": None})
    config = options.build(
        HTSATConfig, spec_size=options.count("spec_size", 256),
        mels=options.count("num_mel_bins", 64), patch=_sizes(options, "patch_size", 4),
        stride=_sizes(options, "patch_stride", (4, 4)),
        width=options.count("patch_embeds_hidden_size", 96),
        depths=_sizes(options, "depths", (2, 2, 6, 2)),
        heads=_sizes(options, "num_attention_heads", (4, 8, 16, 32)),
        window=options.count("window_size", 8), mlp_ratio=options.number("mlp_ratio", 4.0),
        epsilon=options.number("layer_norm_eps", 1e-5, 0),
        activation=options.choose("hidden_act", "gelu", ACTIVATIONS),
        qkv_bias=options.choose("qkv_bias", True, {True: True, False: False}),
        patch_norm=options.choose("enable_patch_layer_norm", True, {True: True, False: False}),
        fusion=fusion, fusion_ratio=options.count("aff_block_r", 4))
    for (_, width), heads in zip(config.layer_widths, config.heads):
        options.build(BlockConfig, width=width, heads=heads, hidden=width)
    options.choose("hidden_size", 768, {config.layer_widths[-1][1]: None})
    return config


def front_end(preprocessor: Options, audio: HTSATConfig) -> FrontEnd:
    """The front end of a preprocessor_config.json; that of LAION's checkpoints without one.

    As the feature extractor of transformers, which leaves `top_db` and `padding_value` unused.
    LAION's window is 10 s; a model that takes less has what it takes.

    Raises:
        ValueError: on an option that is not supported or does not suit the model.
    """
    published = CLAP_FUSED if audio.fusion else CLAP
    if not preprocessor.values:
        settings = dataclasses.replace(published, n_mels=audio.mels)
        longest = (audio.frames - 1) * settings.hop_length / settings.sampling_rate
        seconds = min(10.0, longest)
    else:
        # Only the fused model takes four channels; its filters are HTK's.
        truncation = "fusion" if audio.fusion else "rand_trunc"
        preprocessor.choose("truncation", "fusion", {truncation: None})
        preprocessor.choose("feature_size", 64, {audio.mels: None})
        seconds = preprocessor.number("max_length_s", 10, 0)
        settings = preprocessor.build(
            LogMelSettings, sampling_rate=preprocessor.count("sampling_rate", 48000),
            n_fft=preprocessor.count("fft_window_size", 1024),
            hop_length=preprocessor.count("hop_length", 480), n_mels=audio.mels,
            fmin=preprocessor.number("frequency_min", 0),
            fmax=preprocessor.number("frequency_max", 14000),
            mel_scale=published.mel_scale, norm=published.norm,
            fill=preprocessor.choose("padding", "repeatpad", {
                "repeatpad": "repeatpad", "repeat": "repeat", "pad": "zeros"}))
    made = preprocessor.build(FrontEnd, settings=settings, window_seconds=seconds,
                              fusion=audio.fusion)
    frames = made.input_shape[-2]
    if frames > audio.frames:
        raise ValueError(f"{preprocessor.path}: a window of {seconds:g} s has {frames} frames; the "
                         f"model takes {audio.frames} at most")
    return made


def _sizes(options: Options, name: str, default) -> int | tuple[int, ...]:
    """A whole number or a tuple of them, all above 0."""
    value = options.get(name, default)
    sizes = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for size in sizes:
        Options({name: size}, options.path).count(name, 1)
    return sizes if isinstance(value, (list, tuple)) else value
