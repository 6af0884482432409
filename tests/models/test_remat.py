"""Blocks that the backward pass computes again: the same numbers, less memory."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.cnn14 import Cnn14Config
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig
from tail_jax.models.htsat import HTSATConfig, SwinBlock
from tail_jax.models.transformer import BlockConfig, Stack
from tail_jax.models.wav2vec2 import Wav2Vec2Config
from tail_jax.training.step import REMAT
from tests.training.stepping import make_batch, setup

SMALL = {"width": 8, "layers": 2, "heads": 2, "hidden": 16}
TEXT = TextConfig(vocab_size=20, max_positions=12, **SMALL)
# And how many blocks each has: the last counts twice where a tower pools tokens of it that are
# computed by themselves.
TOWERS = {
    "ast": (ASTConfig(frames=16, mels=8, patch=8, stride=8, **SMALL), 3),
    "eat": (EATConfig(frames=16, mels=8, patch=8, **SMALL), 3),
    "wav2vec2": (Wav2Vec2Config(position_groups=2, **SMALL), 2),
    "htsat": (HTSATConfig(spec_size=16, mels=8, patch=4, width=8, depths=(2, 1), heads=(2, 2),
                          window=2), 3),
    "cnn14": (Cnn14Config(frames=64, channels=(4, 4, 4), width=8), 3),
    "text": (None, 3)}


def checkpoints(jaxpr) -> int:
    """How many parts of a program are computed again in its backward pass."""
    leaves = jax.tree.leaves([eqn.params for eqn in jaxpr.eqns])
    inner = [getattr(leaf, "jaxpr", leaf) for leaf in leaves]
    own = sum(eqn.primitive.name in ("checkpoint", "remat2") for eqn in jaxpr.eqns)
    return own + sum(checkpoints(part) for part in inner if hasattr(part, "eqns"))


@pytest.mark.parametrize("kind", [*TOWERS])
def test_every_block_of_every_tower_is_a_part(kind):
    tower, blocks = TOWERS[kind]
    side = "audio" if tower else "text"
    model = DualEncoder(tower, None if tower else TEXT)
    params = jax.eval_shape(model.init, jax.random.key(0))
    inputs = model.input_shapes(2, 5)
    for remat, count in ((False, 0), (True, blocks)):
        found = dataclasses.replace(model, remat=remat)
        encode = lambda p, b, found=found: found.encode(side, p, None, b)["embedding"]
        assert checkpoints(jax.make_jaxpr(encode)(params, inputs).jaxpr) == count
        assert found.to_dict() == model.to_dict()


def gradients(module, tuning, key):
    """A function of (params, tokens) to the gradients of all that a stack gives."""

    def loss(params, tuning, x):
        mask = jnp.arange(x.shape[1]) < jnp.array([x.shape[1], 3])[:, None]
        chosen = jnp.array([[0], [2]])
        hidden, alone, _ = module.apply({"params": params}, x, mask, tuning, False, chosen,
                                        rngs={"dropout": key})
        return sum(jnp.sin(h).sum() for h in hidden) + jnp.sin(3 * alone).sum()

    return lambda params, x: jax.value_and_grad(loss, argnums=(0, 1))(params, tuning, x)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradients_with_dropout_and_tuning_are_the_same(norm):
    config = BlockConfig(8, 2, 12, norm, dropout=0.2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    params = Stack(config, 2).init(jax.random.key(0), x)["params"]
    draw = lambda *shape: jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    tuning = {"prompts": draw(2, 3, 8), "lora": {"query": {"a": draw(2, 8, 2), "b": draw(2, 2, 8)}}}
    run = lambda remat: jax.jit(gradients(
        Stack(dataclasses.replace(config, remat=remat), 2), tuning, jax.random.key(3)))(params, x)
    (value, expected), (got, found) = run(False), run(True)
    assert float(got) == pytest.approx(float(value), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
                 expected, found)
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(expected[1]))


CONFIG, LAYERS, TOKENS = BlockConfig(16, 2, 64), 6, jax.ShapeDtypeStruct((2, 64, 16), jnp.float32)


def deep(remat):
    """(a stack, the shapes of its parameters)."""
    module = Stack(dataclasses.replace(CONFIG, remat=remat), LAYERS)
    return module, jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]


def kept(remat):
    """Bytes from the forward to the backward pass, parameters among them."""
    module, params = deep(remat)
    out = lambda params, x: module.apply({"params": params}, x)[1]
    found = jax.eval_shape(lambda *args: jax.vjp(out, *args)[1], params, TOKENS)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))


def test_what_passes_to_the_backward_pass_falls():
    assert kept(True) < 0.1 * kept(False)


def test_memory_of_a_train_step_falls():
    """Also on CPUs, where XLA by itself computes all blocks again before it needs them."""
    found = {}
    for remat in REMAT:
        model, method, _, step, state, opt_state, frozen = setup(
            "sequential", (1, 1), hidden=256, layers=4, remat=remat)
        compiled = step.function.lower(
            state["trainable"], opt_state, frozen, state["aux"], method.update_mask(state),
            make_batch(model), jax.random.key(0), jnp.asarray([0, 9], jnp.int32)).compile()
        found[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert found["blocks"] < 0.5 * found["none"]


def test_biases_of_a_wide_feed_forward_are_added_in_place():
    """Of a Swin block computed again: its hidden units and their gradient, not the sum besides."""
    rows, grid, hidden = 3, (64, 64), 256
    kind = nn.remat(SwinBlock, static_argnums=(3,))
    block = kind(BlockConfig(16, 2, hidden, remat=True), grid, 8, False)
    x = jax.ShapeDtypeStruct((rows, *grid, 16), jnp.float32)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, None, True), x)
    loss = lambda params, x: jnp.sin(block.apply(params, x, None, True)).sum()
    compiled = jax.jit(jax.grad(loss, argnums=1), compiler_options={
        "xla_disable_hlo_passes": "cse_barrier_expander"}).lower(params, x).compile()
    each = rows * grid[0] * grid[1] * hidden * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * each
