"""BERT, RoBERTa and CLAP's text tower against transformers (needs the torch extra)."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tail_jax.models.bert import TextConfig, TextTower  # noqa: E402
from tail_jax.pretrained.bert import TEXT  # noqa: E402
from tests.models.parity import close, converted, randomise, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

THEIRS = dict(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
              intermediate_size=48, max_position_embeddings=16)
OURS = TextConfig(vocab_size=60, width=32, layers=3, heads=4, hidden=48, max_positions=16)
KINDS = {
    "bert": (transformers.BertModel, transformers.BertConfig, 0,
             dict(type_vocab_size=2, positions="columns", position_offset=0)),
    "roberta": (transformers.RobertaModel, transformers.RobertaConfig, 1,
                dict(type_vocab_size=2, epsilon=1e-12)),
    "clap": (transformers.ClapTextModel, transformers.ClapTextConfig, 1, {}),
}
OPTIONS = {
    "plain": ({}, {}),
    "tanh": (dict(hidden_act="gelu_new", layer_norm_eps=0.1, type_vocab_size=3),
             dict(activation="gelu_tanh", epsilon=0.1, type_vocab_size=3)),
    "relu": (dict(hidden_act="relu", num_hidden_layers=1), dict(activation="relu", layers=1)),
    "silu": (dict(hidden_act="silu", num_attention_heads=1), dict(activation="silu", heads=1)),
}


def towers(model, config):
    """Our tower applied with the weights of `model`."""
    tower, (ids, mask) = TextTower(config), tokens(0, 60)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), ids, mask)
    params = converted(shapes["params"], model, TEXT)
    return jax.jit(lambda *args: tower.apply({"params": params}, *args))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_text_towers_equal_transformers_layer_by_layer(kind, options):
    model, config, pad, settings = KINDS[kind]
    theirs, ours = OPTIONS[options]
    model = randomise(model(config(**THEIRS | theirs | dict(pad_token_id=pad))), 5)
    apply = towers(model, dataclasses.replace(OURS, **settings | ours))
    for padding in ("right", "left"):
        ids, mask = tokens(6, 60, padding=padding, pad=pad)
        expected = model(torch.tensor(ids).long(), torch.tensor(mask).long(),
                         output_hidden_states=True)
        out = apply(ids, mask)
        for mine, other in zip(out["hidden"], expected.hidden_states, strict=True):
            close(np.asarray(mine)[mask], other[torch.tensor(mask)])
        # Theirs pools the first column, which is padding in a batch padded on the left.
        cls = expected.last_hidden_state[torch.arange(3), torch.tensor(mask.argmax(1))]
        close(out["pooled"], model.pooler(cls[:, None]))
        if padding == "right":
            close(out["pooled"], expected.pooler_output)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_pooling_of_bert_is_that_of_its_last_layer(pool):
    model = randomise(transformers.BertModel(transformers.BertConfig(**THEIRS),
                                             add_pooling_layer=False), 7)
    apply = towers(model, dataclasses.replace(OURS, pool=pool, **KINDS["bert"][3]))
    for padding in ("right", "left"):
        ids, mask = tokens(8, 60, padding=padding, pad=0)
        last = model(torch.tensor(ids).long(), torch.tensor(mask).long()).last_hidden_state
        rows = [row[keep] for row, keep in zip(last, torch.tensor(mask))]
        close(apply(ids, mask)["pooled"],
              torch.stack([row.mean(0) if pool == "mean" else row[0] for row in rows]))
