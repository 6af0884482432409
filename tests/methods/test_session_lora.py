"""LoRA a session: rules over its leaves, and what a session leaves behind."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax import methods
from tail_jax.methods.session_lora import LAYERS, SessionLora
from tail_jax.models.ast import ASTConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig
from tail_jax.training import sharding
from tail_jax.tuning.masks import apply_rules, leaf_name

TOWER = {"frames": 8, "mels": 8, "patch": 4, "width": 8, "layers": 2, "heads": 2, "hidden": 12}
MODEL = DualEncoder(EATConfig(**TOWER), None, classes=5)
NAMES = [name for name, kind in methods.METHODS.items() if issubclass(kind, SessionLora)]


def build(name, **settings):
    small = {"features": 4, "boundary_capacity": 4}  # of PACE
    settings |= {k: v for k, v in small.items() if k in methods.defaults(name)}
    return methods.build({"name": name, "rank": 3} | settings)


@pytest.mark.parametrize("name", NAMES)
def test_rules_cover_every_leaf_once(name):
    method = build(name, weight_decay=0.3)
    trainable = jax.eval_shape(lambda: method.init(jax.random.key(0), MODEL, {}))["trainable"]
    rates = apply_rules(trainable, method.learning_rates())
    assert set(jax.tree.leaves(rates["lora"])) == {method.learning_rate}
    assert set(jax.tree.leaves(rates["heads"])) == {method.head_learning_rate}
    decays = apply_rules(trainable, method.weight_decays())
    for path, decay in jax.tree_util.tree_leaves_with_path(decays):
        assert decay == (0.0 if leaf_name(path).endswith("bias") else 0.3)
    sharding.parameter_shardings(trainable, sharding.make_mesh(1, 1))


@pytest.mark.parametrize("tower", [EATConfig(**TOWER), ASTConfig(stride=4, **TOWER)])
def test_merged_product_gives_what_the_factors_gave(tower):
    model, random = DualEncoder(tower, None, classes=5), np.random.default_rng(0)
    method, params = SessionLora(rank=3, scale=0.7), model.init(jax.random.key(1))
    state = method.init(jax.random.key(2), model, params)
    state["trainable"] = jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.5, x.shape), jnp.float32), state["trainable"])
    state["aux"]["delta"] = jnp.asarray(random.normal(0, 0.3, (2, len(LAYERS), 8, 8)), jnp.float32)
    batch = {"audio": random.normal(-4, 4, (3, *tower.input_shape)).astype(np.float32)}
    run = jax.jit(lambda trainable, delta: method.encode(
        "audio", model, trainable, method.frozen(params), {"delta": delta}, batch)["logits"])
    out = lambda state: run(state["trainable"], state["aux"]["delta"])
    merged = method.end_task(state, 0, types.SimpleNamespace(model=model, key=jax.random.key(3)))
    np.testing.assert_allclose(out(merged), out(state), atol=2e-5)
    unmerged = state | {"trainable": merged["trainable"]}
    assert np.abs(out(merged) - out(unmerged)).max() > 1e-3
    for pair in merged["trainable"]["lora"]["audio"].values():
        assert not np.any(pair["b"]) and np.any(pair["a"])
    np.testing.assert_array_equal(merged["trainable"]["heads"]["classes"]["kernel"],
                                  state["trainable"]["heads"]["classes"]["kernel"])


def test_rank_of_zero_is_an_error():
    with pytest.raises(ValueError, match="method.rank is 0"):
        SessionLora(rank=0)
