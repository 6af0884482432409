"""BERT and RoBERTa in the Hugging Face layout, and what they share with other text towers."""

from __future__ import annotations

import pathlib

from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.transformer import BlockConfig
from tail_jax.pretrained import Description
from tail_jax.pretrained.files import Options, Tensors, read_json
from tail_jax.pretrained.names import NameTable, under

# One block of BERT; of Swin and HTSAT too, but for the norms.
DENSE = (
    ("query", "attention.self.query"), ("key", "attention.self.key"),
    ("value", "attention.self.value"), ("out", "attention.output.dense"),
    ("up", "intermediate.dense"), ("down", "output.dense"))
# A whole text tower, from its embeddings to its pooler.
TEXT = (
    ("word", "embeddings.word_embeddings"), ("position", "embeddings.position_embeddings"),
    ("token_type", "embeddings.token_type_embeddings"), ("norm", "embeddings.LayerNorm"),
    ("pooler", "pooler.dense"),
    *under(r"encoder/layer_(\d+)", "encoder.layer.<1>.", (
        ("norm1", "attention.output.LayerNorm"), ("norm2", "output.LayerNorm"), *DENSE)))
# Arrays that are counted out, not learnt; old files have them.
TEXT_BUFFERS = r"(.*\.)?embeddings\.(position_ids|token_type_ids)"
TABLE = NameTable(
    "BERT", under("text", "", TEXT),
    aliases=((r"^(bert|roberta)\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    # The pooler belongs to the task of pretraining, as do the heads: vectors are means of tokens.
    ignored=(TEXT_BUFFERS, r"pooler\..*", r"(cls|lm_head|classifier|qa_outputs)\..*"))

# hidden_act -> ours. The 'gelu_new' family is one tanh approximation under several names.
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_fast": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
# Where config.json leaves an option out.
_DEFAULTS = {
    "bert": {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2},
    "roberta": {"vocab_size": 50265, "max_position_embeddings": 512, "type_vocab_size": 2},
    "clap": {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}}
# Pooling of sentence-transformers -> `TextConfig.pool`.
_POOLS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def describe(options: Options, preprocessor: Options, tensors: Tensors) -> Description:
    """A text model whose vectors are means over valid tokens.

    A folder of sentence-transformers may choose the first token instead (`1_Pooling`).

    Raises:
        ValueError: on an option that is not supported.
    """
    del preprocessor, tensors
    folder = options.path.parent
    text = text_config(options, options.get("model_type"), _pool(folder))
    return Description(DualEncoder(audio=None, text=text), None, TABLE,
                       max_tokens(folder, text.max_tokens))


def text_config(options: Options, kind: str, pool: str) -> TextConfig:
    """The text tower that the options describe.

    Rates of dropout and of initialisation belong to the training that was; they are left.

    Args:
        options: of config.json, or its section about the text tower.
        kind: 'bert', 'roberta' or 'clap', for defaults and the counting of positions.
        pool: see `TextConfig`.

    Raises:
        ValueError: on an option that is not supported.
    """
    default = _DEFAULTS[kind]
    for name, only in (("position_embedding_type", "absolute"), ("is_decoder", False),
                       ("add_cross_attention", False)):
        options.choose(name, only, {only: only})
    # RoBERTa's padding id is a row of the position table; positions follow it.
    padding = options.count("pad_token_id", 1, least=0)
    positions = {"positions": "columns", "position_offset": 0} if kind == "bert" else \
        {"positions": "tokens", "position_offset": padding + 1}
    width, heads = options.count("hidden_size", 768), options.count("num_attention_heads", 12)
    options.build(BlockConfig, width=width, heads=heads, hidden=width)
    return options.build(
        TextConfig, vocab_size=options.count("vocab_size", default["vocab_size"]),
        width=width, heads=heads, layers=options.count("num_hidden_layers", 12),
        hidden=options.count("intermediate_size", 3072),
        max_positions=options.count("max_position_embeddings", default["max_position_embeddings"]),
        type_vocab_size=options.count("type_vocab_size", default["type_vocab_size"]),
        pool=pool, epsilon=options.number("layer_norm_eps", 1e-12, 0),
        activation=options.choose("hidden_act", "gelu", ACTIVATIONS), **positions)


def max_tokens(folder: pathlib.Path, positions: int) -> int:
    """The longest text: what the position table holds, or what tokenizer_config.json cuts to."""
    path = pathlib.Path(folder) / "tokenizer_config.json"
    options = Options(read_json(path) if path.is_file() else {}, path)
    # Tokenizers without a limit write 1e30.
    return int(min(options.number("model_max_length", positions, least=1), positions))


def _pool(folder: pathlib.Path) -> str:
    """How a folder of sentence-transformers makes one vector of the tokens; else the mean."""
    path, pool = folder / "modules.json", "mean"
    for module in read_json(path, list) if path.is_file() else ():
        if not isinstance(module, dict):
            raise ValueError(f"{path}: has an entry {module!r}; expected objects")
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            config = folder / str(module.get("path", "")) / "config.json"
            modes = [k for k, v in read_json(config).items() if k.startswith("pooling_mode") and v]
            if len(modes) != 1 or modes[0] not in _POOLS:
                raise ValueError(f"{config}: asks for {modes or 'no pooling'}; supported: one of "
                                 f"{[*_POOLS]}")
            pool = _POOLS[modes[0]]
        elif kind not in ("Transformer", "Normalize"):
            raise ValueError(f"{path}: has a module {kind!r} behind the encoder; supported: "
                             "Transformer, Pooling, Normalize")
    return pool
