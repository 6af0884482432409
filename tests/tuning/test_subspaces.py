"""Subspaces of attention inputs: against NumPy, closed forms, and what optimizers do to LoRA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tail_jax.methods.base import Method
from tail_jax.models.ast import ASTConfig
from tail_jax.models.cnn14 import Cnn14Config
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer
from tail_jax.tuning import subspaces

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = {"frames": 12, "mels": 8, "patch": 4, "width": 8, "layers": 3, "heads": 2, "hidden": 12}


def rotation(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def lora(layers, d, r, seed, b=None):
    random = np.random.default_rng(seed)
    a = random.uniform(-d**-0.5, d**-0.5, (layers, d, r))
    b = random.normal(size=(layers, r, d)) * d**-0.5 if b is None else b
    return {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}


# --- Inputs and their moments -------------------------------------------------------------------


@pytest.mark.parametrize("config", [EATConfig(**SIZES), ASTConfig(stride=4, **SIZES)])
def test_attention_inputs_are_what_the_key_layer_is_given(config):
    model, random = DualEncoder(config, None), np.random.default_rng(4)
    params = jax.jit(model.init)(jax.random.key(3))
    params["audio"]["encoder"] = jax.tree.map(  # norms that are no identity
        lambda x: x + jnp.asarray(random.normal(0, 0.2, x.shape), jnp.float32),
        params["audio"]["encoder"])
    audio = jnp.asarray(random.normal(size=(2, 12, 8)), jnp.float32)
    out, seen = jax.jit(lambda params: model._audio_tower().apply(
        {"params": params}, audio, capture_intermediates=True))(params["audio"])
    inputs = subspaces.attention_inputs(model, params, out["hidden"])
    assert len(inputs) == config.layers
    for i, u in enumerate(inputs):
        layer = params["audio"]["encoder"][f"layer_{i:02d}"]["key"]
        given = seen["intermediates"]["encoder"][f"layer_{i:02d}"]["key"]["__call__"][0]
        np.testing.assert_allclose(u @ layer["kernel"] + layer["bias"], given, atol=1e-5)


def test_a_tower_without_such_inputs_is_refused_in_one_line():
    with pytest.raises(ValueError, match="model.audio is Cnn14; .* 'eat' and 'ast'"):
        subspaces.attention_inputs(DualEncoder(Cnn14Config(), None), {}, [])


@pytest.mark.parametrize("sizes", [(4, 4), (3, 7, 1)])
def test_moments_do_not_depend_on_the_batches_or_their_padding(sizes):
    random = np.random.default_rng(0)
    data = [random.normal(3, 1, (sum(sizes), 5, 6)) for _ in range(2)]  # 2 blocks, 5 tokens
    total, start = None, 0
    for size in sizes:
        inputs = [np.concatenate([x[start:start + size], np.full((2, 5, 6), 1e3)]) for x in data]
        mask = np.arange(size + 2) < size
        total = subspaces.add_moments(total, subspaces.second_moments(
            [jnp.asarray(x, jnp.float32) for x in inputs], jnp.asarray(mask)))
        start += size
    for block, x in enumerate(data):
        rows = x.reshape(-1, 6)
        assert total["rows"] == len(rows) and total["sum"].dtype == np.float64
        np.testing.assert_allclose(total["sum"][block], rows.T @ rows, rtol=1e-6)


# --- Projectors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [8, 13])
def test_projector_takes_the_least_number_of_directions_with_the_energy(d):
    q = rotation(d)
    values = np.array([50, 30, 15, 4] + [1 / (d - 4)] * (d - 4))
    moments = 7 * q * values @ q.T
    for energy, k in ((0.5, 1), (0.51, 2), (0.8, 2), (0.95, 3), (0.96, 4), (0.99, 4), (1.0, d)):
        assert subspaces.subspace(moments, energy)[1] == k
        p = subspaces.projector(moments, energy)
        np.testing.assert_allclose(p, q[:, :k] @ q[:, :k].T, atol=1e-12)
        np.testing.assert_allclose(subspaces.projector(moments, energy, "complement"),
                                   np.eye(d) - p, atol=1e-12)


def test_energy_one_asks_for_no_direction_without_energy():
    rows = np.random.default_rng(0).normal(size=(3, 10))
    assert subspaces.subspace(rows.T @ rows, 1.0)[1] == 3


def test_scaled_projector_is_that_over_the_root_of_its_rank():
    p = rotation(9)[:, :4]
    np.testing.assert_allclose(subspaces.scale_projection(p @ p.T), p @ p.T / 2, atol=1e-12)
    assert not subspaces.scale_projection(np.zeros((3, 3))).any()


@pytest.mark.parametrize("moments, energy, reading, message", [
    (np.zeros((3, 3)), 0.9, "principal", "trace 0.0; expected a positive"),
    (np.full((3, 3), np.nan), 0.9, "principal", "trace nan"),
    (np.eye(3), 0.0, "principal", "method.energy is 0.0"),
    (np.eye(3), 1.1, "principal", "method.energy is 1.1"),
    (np.eye(3), 0.9, "main", "method.reading is 'main'")])
def test_what_gives_no_projector_is_an_error(moments, energy, reading, message):
    with pytest.raises(ValueError, match=message):
        subspaces.projector(moments, energy, reading)


# --- LoRA under an optimizer ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Decayed(Method):
    """One rate and one decay for all leaves."""

    learning_rate: float = 0.05
    weight_decay: float = 0.1

    def weight_decays(self):
        return [(r".*", self.weight_decay)]


def adamw(trainable):
    optimizer = make_optimizer(OptimizerConfig(), Decayed(), trainable)
    mask = jax.tree.map(lambda _: jnp.asarray(True), trainable)
    state = optimizer.init(trainable)

    def step(g, state, trainable, number):
        return optimizer.update(g, state, trainable, mask, number, 100)[:2]

    return state, step


def by_optax(transform):
    def make(trainable):
        def step(g, state, trainable, number):
            updates, state = transform.update(g, state, trainable)
            return optax.apply_updates(trainable, updates), state

        return transform.init(trainable), step

    return make


OPTIMIZERS = {
    "momentum": by_optax(optax.sgd(0.05, momentum=0.9)),
    "decay": by_optax(optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.05, 0.9))),
    "adam": by_optax(optax.adam(0.01)), "adamw": adamw}


@pytest.mark.parametrize("layers, d, r, k", [(2, 64, 4, 30), (3, 37, 5, 11)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_first_factor_stays_in_its_subspace_over_100_steps(kind, layers, d, r, k):
    q = [rotation(d, seed)[:, :k] for seed in range(layers)]
    exact = np.stack([x @ x.T for x in q])
    p = jnp.asarray(exact, jnp.float32)
    factors = lora(layers, d, r, 1)
    tree = {"key": factors | {"a": subspaces.project_start(factors["a"], p)}}
    start = tree
    state, step = OPTIMIZERS[kind](tree)
    random = np.random.default_rng(2)

    @jax.jit
    def run(g, state, tree, number):
        after, state = step(g, state, tree, number)
        return subspaces.project_update(tree, after, p), state

    for number in range(100):
        g = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), tree)
        tree, state = run(g, state, tree, number)
    a = np.asarray(tree["key"]["a"], np.float64)
    outside = a - exact @ a
    assert np.linalg.norm(outside) <= 1e-6 * np.linalg.norm(a)
    assert np.linalg.norm(a - start["key"]["a"]) > 0.1 * np.linalg.norm(a)  # it did train
    assert (np.asarray(tree["key"]["b"]) != np.asarray(start["key"]["b"])).all()


def test_both_sides_are_projected_where_asked_and_unmoved_factors_keep_their_bits():
    p = rotation(7)[:, :3]
    p = jnp.asarray(p @ p.T, jnp.float32)[None]
    before, after = lora(1, 7, 2, 0), lora(1, 7, 2, 1)
    one, both = (subspaces.project_update({"key": before}, {"key": after}, p, sides)["key"]
                 for sides in ("in", "both"))
    np.testing.assert_array_equal(one["b"], after["b"])
    np.testing.assert_array_equal(one["a"], both["a"])
    moved = np.asarray(both["b"] - before["b"], np.float64)
    np.testing.assert_allclose(moved, np.asarray(after["b"] - before["b"]) @ p[0], atol=1e-6)
    same = subspaces.project_update({"key": before}, {"key": before}, p, "both")["key"]
    jax.tree.map(np.testing.assert_array_equal, same, before)
    with pytest.raises(ValueError, match="method.project_sides is 'out'"):
        subspaces.project_update({}, {}, p, "out")


def test_identity_confines_nothing():
    before, after = {"key": lora(2, 5, 3, 0)}, {"key": lora(2, 5, 3, 1)}
    out = subspaces.project_update(before, after, subspaces.identity(2, 5), "both")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), out, after)


# --- Two linear layers: what is kept of old outputs -----------------------------------------------


@dataclasses.dataclass
class TwoLayers:
    """x -> x (K1 + a1 b1) -> (. + ) (K2 + a2 b2), and the session after one that was learned.

    Old inputs and the old session's LoRA (`delta`) lie in a span S; K1 and K2 are rotations.
    """

    d: int
    r: int
    overlap: float = 0.0

    def __post_init__(self):
        d, random = self.d, np.random.default_rng(5)
        basis = rotation(d, 6)
        old, new = basis[:, :d // 3], basis[:, d // 3:]
        draw = lambda n, span: random.normal(size=(n, span.shape[1])) @ span.T
        self.x_old = draw(23, old)
        self.x_new = draw(29, new[:, :d // 3]) + self.overlap * draw(29, old)
        kernels = [rotation(d, 7), rotation(d, 8)]
        # The old session's factors read S and write into the image of S: they lie in its span.
        spans, self.delta = [old, kernels[0].T @ old], []
        for kernel, span in zip(kernels, spans):
            a = span @ random.normal(size=(span.shape[1], self.r))
            b = random.normal(size=(self.r, span.shape[1])) @ (kernel.T @ span).T
            self.delta.append(a @ b / d)
        self.kernels = kernels
        self.target = random.normal(size=(29, d))

    def apply(self, x, change=(0, 0), sign=1.0):
        """(inputs of both layers, output) with the kernels K + sign delta + change."""
        inputs = []
        for kernel, delta, extra in zip(self.kernels, self.delta, change):
            inputs.append(x)
            x = x @ (kernel + sign * delta + extra)
        return inputs, x

    def projectors(self, energy, reading):
        inputs, _ = self.apply(self.x_new, sign=-1.0)  # the unlearned model
        return np.stack([subspaces.projector(u.T @ u, energy, reading) for u in inputs])

    def train(self, p, project_init=True, optimizer="momentum", project=True):
        """(factors, losses) of 100 steps on the new session."""
        p32 = jnp.asarray(p, jnp.float32)
        factors = lora(2, self.d, self.r, 9, b=np.zeros((2, self.r, self.d)))
        if project_init:
            factors["a"] = subspaces.project_start(factors["a"], p32)
        tree = {"value": factors}
        kernels = [jnp.asarray(k + e, jnp.float32) for k, e in zip(self.kernels, self.delta)]
        x, y = jnp.asarray(self.x_new, jnp.float32), jnp.asarray(self.target, jnp.float32)

        def loss(tree):
            out = x
            for i, kernel in enumerate(kernels):
                out = out @ kernel + (out @ tree["value"]["a"][i]) @ tree["value"]["b"][i]
            return jnp.square(out - y).sum(-1).mean() / 2

        state, step = OPTIMIZERS[optimizer](tree)

        @jax.jit
        def run(tree, state, number):
            value, g = jax.value_and_grad(loss)(tree)
            after, state = step(g, state, tree, number)
            after = subspaces.project_update(tree, after, p32) if project else after
            return after, state, value

        losses = []
        with jax.default_matmul_precision("highest"):
            for number in range(100):
                tree, state, value = run(tree, state, number)
                losses.append(float(value))
        return jax.tree.map(lambda x: np.asarray(x, np.float64), tree["value"]), losses

    def moved(self, factors):
        """Relative change of the outputs on old inputs."""
        change = factors["a"] @ factors["b"]
        before, after = self.apply(self.x_old)[1], self.apply(self.x_old, change)[1]
        return np.linalg.norm(after - before) / np.linalg.norm(before)


LINEAR = [(64, 4), (37, 3)]


@pytest.mark.parametrize("d, r", LINEAR)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_old_outputs_stay_while_the_new_loss_falls(d, r, optimizer):
    model = TwoLayers(d, r)
    p = model.projectors(0.99, "principal")
    factors, losses = model.train(p, optimizer=optimizer)
    assert model.moved(factors) <= 1e-6
    assert losses[-1] < 0.9 * losses[0]
    for loose in ({"project_init": False}, {"project_init": False, "project": False}):
        factors, _ = model.train(p, optimizer=optimizer, **loose)
        assert model.moved(factors) > 1e-1


@pytest.mark.parametrize("d, r", LINEAR)
def test_overlapping_inputs_move_no_further_than_their_share_in_the_subspace(d, r):
    model = TwoLayers(d, r, overlap=0.3)
    p = model.projectors(0.99, "principal")
    factors, _ = model.train(p)
    change = factors["a"][0] @ factors["b"][0]
    largest = np.linalg.norm(change, 2)
    moved = np.linalg.norm(model.x_old @ change, axis=1)
    bound = np.linalg.norm(model.x_old @ p[0], axis=1) * largest
    assert (moved <= bound * (1 + 1e-5)).all() and (moved > 1e-3).any()
    plain = np.linalg.norm(model.x_old, axis=1) * largest
    assert (bound < 0.999 * plain).all()  # the bound says something


@pytest.mark.parametrize("d, r", LINEAR)
def test_the_complement_learns_next_to_nothing(d, r):
    # The reason for the default reading: at the lowest block the gradient of `a` lies in the row
    # space of the inputs, which the complement takes out.
    model = TwoLayers(d, r)
    p = model.projectors(1.0, "complement")
    factors, losses = model.train(p)
    change = factors["a"] @ factors["b"]
    u = np.eye(d) - p
    assert np.linalg.norm(u @ change) <= 1e-6 * max(np.linalg.norm(change), 1)
    _, principal = model.train(model.projectors(1.0, "principal"))
    assert losses[0] - losses[-1] < 0.02 * (principal[0] - principal[-1])
