"""What a load needs beside the parameters it returns."""

import json
import tracemalloc

import jax
import numpy as np
import safetensors.numpy

from tail_jax import pretrained
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.pretrained.bert import TABLE
from tail_jax.pretrained.names import unfill


def test_a_load_holds_the_weights_once(tmp_path):
    config = {"model_type": "bert", "vocab_size": 20000, "hidden_size": 256, "type_vocab_size": 1,
              "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024,
              "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = DualEncoder(audio=None, text=TextConfig(
        vocab_size=20000, width=256, layers=4, heads=4, hidden=1024, max_positions=64, pool="mean"))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    safetensors.numpy.save_file(unfill(TABLE, ones), tmp_path / "model.safetensors")
    tracemalloc.start()
    params = pretrained.load(tmp_path)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert size > 30e6
    assert peak < 1.3 * size
    # Given to XLA as they are: an aligned array is not copied once more.
    assert all(leaf.ctypes.data % 64 == 0 for leaf in jax.tree.leaves(params))
