"""AST against transformers on the same random weights (needs the torch extra)."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tail_jax.models.ast import ASTConfig, ASTTower  # noqa: E402
from tail_jax.pretrained.ast import AST  # noqa: E402
from tests.models.parity import close, converted, randomise, recorded  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

THEIRS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
              max_length=50, num_mel_bins=27, patch_size=8, frequency_stride=5, time_stride=5)
OURS = ASTConfig(frames=50, mels=27, patch=8, stride=5, width=32, layers=2, heads=4, hidden=48)
OPTIONS = {
    "plain": ({}, {}),
    "two strides": (dict(frequency_stride=3, time_stride=7), dict(stride=(3, 7))),
    "stride beyond the patch": (dict(frequency_stride=9, time_stride=4), dict(stride=(9, 4))),
    "wider than long": (dict(max_length=8, num_mel_bins=40), dict(frames=8, mels=40)),
    "no biases": (dict(qkv_bias=False, hidden_act="gelu_pytorch_tanh", layer_norm_eps=0.1),
                  dict(qkv_bias=False, activation="gelu_tanh", epsilon=0.1)),
    "relu": (dict(hidden_act="relu", num_hidden_layers=3), dict(activation="relu", layers=3)),
    "swish": (dict(hidden_act="swish", num_attention_heads=1), dict(activation="silu", heads=1)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_ast_equals_transformers_layer_by_layer(name):
    theirs, ours = OPTIONS[name]
    model = randomise(transformers.ASTModel(transformers.ASTConfig(**THEIRS | theirs)), 3)
    config = dataclasses.replace(OURS, **ours)
    tower = ASTTower(config)
    # In dB: their feature extractor normalises with the same two constants before the model.
    audio = np.random.default_rng(4).normal(-4, 9, (3, *config.input_shape)).astype(np.float32)
    params = jax.eval_shape(tower.init, jax.random.key(0), audio)["params"]
    params = converted(params, model, AST, input_mean=-4.2677393, input_std=4.5689974)
    hidden = recorded([model.embeddings, *model.layers])
    expected = model(torch.tensor((audio + 4.2677393) / (2 * 4.5689974)))
    out = jax.jit(tower.apply)({"params": params}, audio)
    for mine, other in zip(out["hidden"], hidden, strict=True):
        close(mine, other)
    close(out["tokens"], expected.last_hidden_state)
    close(out["pooled"], expected.pooler_output)
    assert out["pooled"].shape == (3, config.width)
    assert out["tokens"].shape[1] == 2 + np.prod(config.grid)
