"""wav2vec 2.0 and data2vec-audio in the Hugging Face layout, alone or below a head."""

from __future__ import annotations

import numpy as np

from data_pipelines.front_end import FrontEnd, WaveformSettings
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.wav2vec2 import Wav2Vec2Config
from tail_jax.pretrained import Description
from tail_jax.pretrained.bert import ACTIVATIONS
from tail_jax.pretrained.files import Options, Tensors
from tail_jax.pretrained.names import NameTable, under

# No configuration sets a window, and what attention costs grows with its square: over 30 s (1499
# frames) it is a third of what the dense layers of a base model cost. Few utterances are longer.
WINDOW_SECONDS = 30.0


def _folded(gain: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Weight norm (Salimans and Kingma 2016) over each tap: g v / |v|, in Flax's layout."""
    norm = np.sqrt(np.square(direction, dtype=np.float64).sum((0, 1), keepdims=True))
    if gain.shape != norm.shape:  # a gain for each output would broadcast as well
        raise ValueError(f"expected a gain {list(norm.shape)}, one for each tap")
    return np.moveaxis(gain * direction / norm, (0, 1), (-1, -2))


def _unfolded(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gain and direction of a kernel; its own direction, so that the gain is its norm."""
    direction = np.moveaxis(kernel, (-1, -2), (0, 1))
    return np.sqrt(np.square(direction).sum((0, 1), keepdims=True)), direction


_POSITION = "encoder.pos_conv_embed"
_NORMED = f"{_POSITION}.conv.parametrizations.weight.original"
ENCODER = (
    (r"conv_(\d+)", "feature_extractor.conv_layers.<1>.conv"),
    (r"conv_norm_(\d+)", "feature_extractor.conv_layers.<1>.layer_norm"),
    ("feature_norm", "feature_projection.layer_norm"), ("project", "feature_projection.projection"),
    ("norm", "encoder.layer_norm"),
    *under(r"encoder/layer_(\d+)", "encoder.layers.<1>.", (
        ("query", "attention.q_proj"), ("key", "attention.k_proj"), ("value", "attention.v_proj"),
        ("out", "attention.out_proj"), ("up", "feed_forward.intermediate_dense"),
        ("down", "feed_forward.output_dense"), ("norm1", "layer_norm"),
        ("norm2", "final_layer_norm"))))
# One convolution with weight norm, or several plain ones.
WAV2VEC2 = (("position_0/kernel", (f"{_NORMED}0", f"{_NORMED}1"), (_folded, _unfolded)),
            ("position_0", f"{_POSITION}.conv"), *ENCODER)
DATA2VEC = ((r"position_(\d+)", f"{_POSITION}.layers.<1>.conv"), *ENCODER)
ALIASES = ((r"^(wav2vec2|data2vec_audio)\.", ""),
           (r"\.weight_g$", ".parametrizations.weight.original0"),
           (r"\.weight_v$", ".parametrizations.weight.original1"))
# What pretraining masks with and predicts by, and heads.
IGNORED = (r"masked_spec_embed|mask_time_emb_vector", r"(quantizer|project_hid|project_q)\..*",
           r"(lm_head|projector|classifier|tdnn|objective)\..*", r"layer_weights",
           r"feature_extractor\.(weight|bias)", r"adapter\..*")


def describe(options: Options, preprocessor: Options, tensors: Tensors) -> Description:
    """An audio encoder of waveforms, as config.json and preprocessor_config.json say.

    Rates of dropout, masking and initialisation belong to the training that was; they are left.

    Raises:
        ValueError: on an option that is not supported.
    """
    del tensors
    for name, only in (("add_adapter", False), ("adapter_attn_dim", None),
                       ("conv_pos_batch_norm", False)):
        options.choose(name, only, {only: None})
    preprocessor.choose("feature_size", 1, {1: None})
    data2vec = options.get("model_type") == "data2vec-audio"
    # data2vec has one kind of norms, whatever its config.json carries along.
    own = {
        "feature_norm": "layer", "position_kernel": options.count("conv_pos_kernel_size", 19),
        "position_layers": options.count("num_conv_pos_embeddings", 5), "position_norm": True,
    } if data2vec else {
        "feature_norm": options.choose("feat_extract_norm", "group",
                                       {"group": "group", "layer": "layer"}),
        "position_kernel": options.count("num_conv_pos_embeddings", 128),
        "norm": options.choose("do_stable_layer_norm", False, {False: "post", True: "pre"})}
    rate = preprocessor.count("sampling_rate", 16000)
    audio = options.build(
        Wav2Vec2Config, samples=round(WINDOW_SECONDS * rate),
        feature_widths=_counts(options, "conv_dim", Wav2Vec2Config.feature_widths),
        feature_kernels=_counts(options, "conv_kernel", Wav2Vec2Config.feature_kernels),
        feature_strides=_counts(options, "conv_stride", Wav2Vec2Config.feature_strides),
        feature_bias=options.choose("conv_bias", False, {False: False, True: True}),
        feature_activation=options.choose("feat_extract_activation", "gelu", ACTIVATIONS),
        position_groups=options.count("num_conv_pos_embedding_groups", 16),
        width=options.count("hidden_size", 768), layers=options.count("num_hidden_layers", 12),
        heads=options.count("num_attention_heads", 12),
        hidden=options.count("intermediate_size", 3072),
        activation=options.choose("hidden_act", "gelu", ACTIVATIONS),
        epsilon=options.number("layer_norm_eps", 1e-5, 0), **own)
    settings = WaveformSettings(
        rate, preprocessor.choose("do_normalize", True, {True: True, False: False}),
        audio.min_samples)
    table = NameTable("data2vec-audio" if data2vec else "wav2vec 2.0",
                      under("audio", "", DATA2VEC if data2vec else WAV2VEC2), ALIASES, IGNORED)
    return Description(DualEncoder(audio, None), FrontEnd(settings, WINDOW_SECONDS), table)


def _counts(options: Options, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """A list of whole numbers above 0, one a convolution."""
    value = options.get(name, default)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{options.path}: option {name} is {value!r}; expected a list")
    return tuple(Options({name: v}, options.path).count(name, 1) for v in value)
