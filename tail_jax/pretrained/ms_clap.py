"""MS-CLAP 2022 (Elizalde et al. 2023): Cnn14, BERT and residual projections in one .pth file.

The file has no configuration: sizes are those of its weights, heads are 64 wide, and the front end
is the one published with it. It has no tokenizer either; text needs the tokenizer.json of
bert-base-uncased beside it. Captions are cut at 100 tokens, as in the original. Padding them to 100
as the original does changes nothing, because it is masked.
"""

from __future__ import annotations

import dataclasses
import re

from data_pipelines.front_end import PANNS, FrontEnd
from tail_jax.models.bert import TextConfig
from tail_jax.models.cnn14 import Cnn14Config
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.pretrained import Description, bert
from tail_jax.pretrained.files import Options, Tensors
from tail_jax.pretrained.names import NameTable, under

WINDOW_SECONDS, MAX_TOKENS = 5.0, 100
AUDIO, TEXT = "audio_encoder.base.", "caption_encoder.base."
TABLE = NameTable(
    "MS-CLAP 2022",
    under("audio", AUDIO, (
        ("input_norm", "bn0"), (r"block_(\d+)/conv(\d)", "conv_block<1>.conv<2>"),
        (r"block_(\d+)/norm(\d)", "conv_block<1>.bn<2>"), ("fc1", "fc1")))
    + under("text", TEXT, bert.TEXT)
    + tuple((f"heads/{ours}/{layer}", f"{theirs}_encoder.projection.{name}")
            for ours, theirs in (("audio", "audio"), ("text", "caption"))
            for layer, name in (("linear1", "linear1"), ("linear2", "linear2"),
                                ("norm", "layer_norm")))
    + (("logit_scale", "logit_scale"),),
    aliases=((r"^module\.", ""),),
    ignored=(
        # The front end as weights, AudioSet's classifier, and what BERT has beside its encoder.
        re.escape(AUDIO) + r"(spectrogram_extractor|logmel_extractor|fc_audioset)\..*",
        r".*\.num_batches_tracked",
        re.escape(TEXT) + r"(pooler\..*|embeddings\.(position_ids|token_type_ids))"))


def describe(config: Options, preprocessor: Options, tensors: Tensors) -> Description:
    """MS-CLAP as the shapes of a file say.

    Raises:
        ValueError: another text encoder than BERT, or a file that is not whole.
    """
    del config, preprocessor  # a .pth has neither
    shapes = {re.sub(*TABLE.aliases[0], key): shape for key, shape in tensors.shapes.items()}

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if len(shapes.get(key, ())) != rank:
            found = list(shapes[key]) if key in shapes else "missing"
            raise ValueError(
                f"{tensors.path}: not MS-CLAP 2022 (Cnn14 and BERT): {key} is {found}; expected an "
                f"array of rank {rank}. MS-CLAP 2023 and clapcap are not supported")
        return shapes[key]

    def numbers(pattern: str) -> list[int]:
        matches = (re.fullmatch(pattern, key) for key in shapes)
        return sorted(int(match[1]) for match in matches if match)

    channels = tuple(shape(f"{AUDIO}conv_block{i}.conv2.weight", 4)[0] for i in numbers(
        re.escape(AUDIO) + r"conv_block(\d+)\.conv2\.weight"))
    layers = len(numbers(re.escape(TEXT) + r"encoder\.layer\.(\d+)\.output\.dense\.weight"))
    mels, = shape(AUDIO + "bn0.weight", 1)
    table = lambda name: shape(f"{TEXT}embeddings.{name}_embeddings.weight", 2)
    vocab_size, width = table("word")
    max_positions = table("position")[0]
    hidden = shape(TEXT + "encoder.layer.0.intermediate.dense.weight", 2)[0]
    settings = dataclasses.replace(PANNS, n_mels=mels)
    front_end = FrontEnd(settings, WINDOW_SECONDS)
    model = DualEncoder(
        Cnn14Config(front_end.input_shape[0], mels, channels, shape(AUDIO + "fc1.weight", 2)[0]),
        TextConfig(vocab_size=vocab_size, width=width, layers=layers, heads=max(width // 64, 1),
                   hidden=hidden, max_positions=max_positions,
                   type_vocab_size=table("token_type")[0], position_offset=0, pool="cls",
                   epsilon=1e-12),
        shape("caption_encoder.projection.linear1.weight", 2)[0], head="residual")
    return Description(model, front_end, TABLE, min(MAX_TOKENS, max_positions))
