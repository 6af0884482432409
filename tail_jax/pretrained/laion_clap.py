"""CLAP in LAION's own files (`630k-audioset-best.pt` and the like), which carry no configuration.

Sizes come from the shapes of the arrays. What shapes cannot say is as in every published one:
patches do not overlap, heads of RoBERTa are 64 wide, and texts are cut to 77 tokens.
"""

from __future__ import annotations

import math
import re

from data_pipelines.front_end import CLAP, CLAP_FUSED, FrontEnd
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.pretrained import Description
from tail_jax.pretrained.bert import TEXT
from tail_jax.pretrained.clap import BUFFERS, TEMPERATURE, htsat
from tail_jax.pretrained.files import Options, Tensors
from tail_jax.pretrained.names import NameTable, under

_QKV = tuple((name, f"attn.qkv[{i}/3]") for i, name in enumerate(("query", "key", "value")))
TABLE = NameTable(
    "LAION CLAP", (
        *under("audio", "audio_branch.", htsat("bn0", (
            ("relative_position_bias", "attn.relative_position_bias_table"),
            *under("block", "", (("norm1", "norm1"), ("norm2", "norm2"), *_QKV,
                                 ("out", "attn.proj"), ("up", "mlp.fc1"), ("down", "mlp.fc2")))))),
        *under("text", "text_branch.", TEXT),
        (r"heads/(audio|text)/linear1", "<1:s>_projection.0"),
        (r"heads/(audio|text)/linear2", "<1:s>_projection.2"), TEMPERATURE),
    aliases=((r"^(module\.|model\.)+", ""),),  # of parallel training, and of its class for users
    # The front end and the classifier of HTSAT, and heads that only its training used.
    ignored=(*BUFFERS, r".*\.attn_mask", r"(audio|text)_transform\..*",
             r"audio_branch\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\..*"))
_MAX_TOKENS = 77
_HEAD_WIDTH = 64
_SPEC_SIZE = 256


def describe(options: Options, preprocessor: Options, tensors: Tensors) -> Description:
    """A dual encoder with the sizes of the arrays of a file.

    Raises:
        ValueError: if an array that names a size is missing, or sizes contradict each other.
    """
    del preprocessor
    shapes = {re.sub(*TABLE.aliases[0], key): shape for key, shape in tensors.shapes.items()}

    def shape(key: str) -> tuple[int, ...]:
        if key not in shapes:
            raise ValueError(f"{tensors.path}: has no {key}; expected a CLAP of LAION with HTSAT "
                             "and RoBERTa, whole")
        return shapes[key]

    file = Options({}, tensors.path)
    audio = file.build(_audio, shape=shape, has=shapes.__contains__)
    vocab_size, width = shape("text_branch.embeddings.word_embeddings.weight")
    text = file.build(
        TextConfig, vocab_size=vocab_size, width=width, heads=max(1, width // _HEAD_WIDTH),
        layers=_count(shapes, "text_branch.encoder.layer."),
        hidden=shape("text_branch.encoder.layer.0.intermediate.dense.weight")[0],
        max_positions=shape("text_branch.embeddings.position_embeddings.weight")[0],
        type_vocab_size=shape("text_branch.embeddings.token_type_embeddings.weight")[0],
        epsilon=1e-5)
    model = DualEncoder(audio, text, embedding=shape("text_projection.0.weight")[0])
    front_end = FrontEnd(CLAP_FUSED if audio.fusion else CLAP, 10, audio.fusion)
    return Description(model, front_end, TABLE, min(_MAX_TOKENS, text.max_tokens))


def _audio(shape, has) -> HTSATConfig:
    width, _, *patch = shape("audio_branch.patch_embed.proj.weight")
    depths, heads = [], []
    while has(_table(len(depths), 0)):
        stage, depth = len(depths), 0
        while has(_table(stage, depth)):
            depth += 1
        depths.append(depth)
        heads.append(shape(_table(stage, 0))[1])
    window = (math.isqrt(shape(_table(0, 0))[0]) + 1) // 2
    spec_size, mask = _SPEC_SIZE, "audio_branch.layers.0.blocks.1.attn_mask"
    if has(mask):  # of [windows, ...]
        spec_size = math.isqrt(shape(mask)[0]) * window * patch[1]
    fusion = has("audio_branch.patch_embed.mel_conv2d.weight")
    inner = shape("audio_branch.patch_embed.fusion_model.local_att.0.weight")[0] if fusion else 1
    return HTSATConfig(
        spec_size=spec_size, mels=shape("audio_branch.bn0.weight")[0], patch=tuple(patch),
        width=width, depths=tuple(depths), heads=tuple(heads), window=window,
        mlp_ratio=shape("audio_branch.layers.0.blocks.0.mlp.fc1.weight")[0] / width,
        qkv_bias=has("audio_branch.layers.0.blocks.0.attn.qkv.bias"),
        patch_norm=has("audio_branch.patch_embed.norm.weight"),
        fusion=fusion, **{"fusion_ratio": width // inner} if fusion else {})


def _table(stage: int, block: int) -> str:
    return f"audio_branch.layers.{stage}.blocks.{block}.attn.relative_position_bias_table"


def _count(keys, prefix: str) -> int:
    """Number of different components behind a prefix."""
    return len({key[len(prefix):].split(".")[0] for key in keys if key.startswith(prefix)})
