"""Durations, schedule and AdamW, against optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tail_jax.methods.base import Method
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer, parse_duration, schedule


@pytest.mark.parametrize("text, steps", [
    ("10 epochs", 40), ("1 epoch", 4), ("0.5 epochs", 2), ("2000 steps", 2000), ("1 step", 1),
    ("1e5 examples", 3125), ("64 examples", 2), ("  3  epochs ", 12), ("1 example", 1)])
def test_duration_counts_padded_epochs(text, steps):
    assert parse_duration(text, examples=97, batch_size=32) == steps


@pytest.mark.parametrize("text", ["", "10", "epochs", "-1 epochs", "0 steps", "10 minutes",
                                  "1.2.3 epochs", "ten epochs", "1 epoch 2 steps", ". steps"])
def test_duration_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="train.duration is"):
        parse_duration(text, 97, 32)


@pytest.mark.parametrize("total", [10, 37, 500])
def test_schedule_is_warm_up_and_half_a_cosine(total):
    warmup = max(total // 10, 1)
    reference = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, total)
    ours = [float(schedule(jnp.int32(s), jnp.int32(total), warmup / total)) for s in range(total)]
    theirs = [max(float(reference(s + 1)), 1e-3) for s in range(total)]
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert max(ours) <= 1.0 and min(ours) > 0


def test_schedule_without_warm_up_starts_near_the_peak():
    assert float(schedule(jnp.int32(0), jnp.int32(1000), 0.0)) == pytest.approx(1.0, abs=1e-4)


@dataclasses.dataclass(frozen=True)
class TwoRates(Method):
    """Peak rates 0.1 and 0.01, decay on kernels."""

    weight_decay: float = 0.3

    def learning_rates(self):
        return [(r"a/.*", 0.1), (r"b/.*", 0.01)]


@pytest.fixture
def trainable():
    random = np.random.default_rng(0)
    return {side: {"kernel": jnp.asarray(random.normal(size=(3, 5)), jnp.float32),
                   "bias": jnp.asarray(random.normal(size=5), jnp.float32)} for side in "ab"}


def gradients(trainable, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), trainable)


def everything(trainable, value=True):
    return jax.tree.map(lambda x: jnp.asarray(value), trainable)


def test_update_is_adamw_with_a_rate_a_group(trainable):
    config = OptimizerConfig(clip=0.5)
    optimizer = make_optimizer(config, TwoRates(), trainable)
    ours, state = trainable, optimizer.init(trainable)
    decayed = lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", tree)
    clip = optax.clip_by_global_norm(0.5)
    theirs, states = trainable, {}
    adamw = {side: optax.adamw(
        lambda n, rate=rate: rate * schedule(n, 7, config.warmup), config.b1, config.b2,
        config.epsilon, weight_decay=0.3, mask=decayed) for side, rate in (("a", 0.1), ("b", 0.01))}
    states = {side: adamw[side].init(trainable[side]) for side in "ab"}
    for step in range(7):
        g = gradients(trainable, step)
        ours, state, norm = optimizer.update(g, state, ours, everything(ours), step, 7)
        assert float(norm) == pytest.approx(float(np.sqrt(sum(
            (x**2).sum() for x in jax.tree.leaves(g)))), rel=1e-5)
        clipped, _ = clip.update(g, clip.init(g))
        for side in "ab":
            update, states[side] = adamw[side].update(clipped[side], states[side], theirs[side])
            theirs = theirs | {side: optax.apply_updates(theirs[side], update)}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), ours, theirs)


def test_masked_rows_keep_their_bits_under_momentum_and_decay(trainable):
    optimizer = make_optimizer(OptimizerConfig(), TwoRates(weight_decay=0.5), trainable)
    state, mask = optimizer.init(trainable), everything(trainable)
    now, state, _ = optimizer.update(gradients(trainable, 0), state, trainable, mask, 0, 10)
    rows = jnp.asarray([True, False, True])[:, None]
    frozen = now["a"]["kernel"][1]
    mask["a"]["kernel"], mask["b"] = rows, everything(now["b"], False)
    before = now
    for step in range(1, 5):  # zero gradients: only momentum and decay move anything
        zero = jax.tree.map(jnp.zeros_like, now)
        now, state, _ = optimizer.update(zero, state, now, mask, step, 10)
    np.testing.assert_array_equal(now["a"]["kernel"][1], frozen)
    assert (now["a"]["kernel"][0] != before["a"]["kernel"][0]).all()
    jax.tree.map(np.testing.assert_array_equal, now["b"], before["b"])


def test_decay_moves_kernels_alone(trainable):
    optimizer = make_optimizer(OptimizerConfig(), TwoRates(), trainable)
    zero = jax.tree.map(jnp.zeros_like, trainable)
    new, _, _ = optimizer.update(zero, optimizer.init(trainable), trainable,
                                 everything(trainable), 0, 1000)
    np.testing.assert_array_equal(new["a"]["bias"], trainable["a"]["bias"])
    factor = 1 - 0.1 * 0.3 * (1 / 1000 / 0.1)
    np.testing.assert_allclose(new["a"]["kernel"], trainable["a"]["kernel"] * factor, rtol=1e-6)


@pytest.mark.parametrize("field, value", [("b1", 1.0), ("b2", -0.1), ("warmup", 1.0),
                                          ("clip", -1.0), ("epsilon", -1e-8)])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"optimizer.{field} is {value}"):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_decays_before_its_momentum_as_torch_does(momentum):
    config = OptimizerConfig(kind="sgd", momentum=momentum, clip=0.0, warmup=0.0)
    method = Method(learning_rate=0.1, weight_decay=0.02)
    tree = {"layer": {"kernel": jnp.array([[1.0, -2.0]])}}
    optimizer = make_optimizer(config, method, tree)
    state, mask = optimizer.init(tree), jax.tree.map(lambda _: True, tree)
    x, v = np.array([[1.0, -2.0]]), 0.0
    total = 7
    for step in range(total):
        gradients = jax.tree.map(lambda p: p * 0.3 + step, tree)
        tree, state, _ = optimizer.update(gradients, state, tree, mask, step, total)
        v = momentum * v + (0.3 * x + step + 0.02 * x)  # torch.optim.SGD: g + wd p, then momentum
        x = x - 0.1 * max(0.5 * (1 + np.cos(np.pi * (step + 1) / total)), 1e-3) * v
    np.testing.assert_allclose(tree["layer"]["kernel"], x, rtol=1e-5)


def test_optimizer_of_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="optimizer.kind is 'lion'; expected 'adamw' or 'sgd'"):
        OptimizerConfig(kind="lion")
