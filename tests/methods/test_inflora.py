"""InfLoRA: what earlier sessions used, by hand and by SVD, and updates that leave it alone."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax.methods import inflora
from tail_jax.methods.inflora import InfLoRA, empty_basis, grow, new_directions, used
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer

WIDTH, LAYERS = 8, 2
MODEL = DualEncoder(EATConfig(frames=8, mels=8, patch=4, width=WIDTH, layers=LAYERS, heads=2,
                              hidden=12), None, classes=5)


def rotation(d, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def data_of(moments, seed=0):
    """A session whose attention inputs have these moments [L, d, d]."""
    return types.SimpleNamespace(model=MODEL, key=jax.random.key(seed),
                                 fold_audio=lambda function, state, merge: {"sum": moments})


# --- The basis ------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [np.eye(7), rotation(7, 0)], ids=["axes", "rotated"])
def test_basis_grows_by_energy_and_turns_into_its_complement_past_half_the_width(q):
    basis, along = empty_basis(7), lambda *energies: q * np.array(energies) @ q.T
    steps = [  # energies along the axes, share, axes used afterwards, columns, complement
        ((60, 36, 4, 0, 0, 0, 0), 0.95, (0, 1), 2, False),
        ((90, 0, 6, 0, 4, 0, 0), 0.90, (0, 1), 2, False),     # what is used has enough
        ((10, 0, 50, 0, 40, 0, 0), 0.95, (0, 1, 2, 4), 3, True),
        ((0, 20, 0, 5, 0, 0, 75), 0.95, (0, 1, 2, 4, 6), 2, True),
        ((0, 9, 0, 0, 0, 1, 0), 0.90, (0, 1, 2, 4, 6), 2, True),
        ((1, 0, 0, 1, 0, 2, 0), 1.00, range(7), 0, True)]
    for energies, share, axes, columns, complement in steps:
        basis = grow(basis, along(*energies), share)
        assert (basis["columns"], basis["complement"]) == (columns, complement)
        expected = q[:, list(axes)]
        np.testing.assert_allclose(used(basis), expected @ expected.T, atol=1e-12)
        assert basis["vectors"].shape == (7, 3) and not basis["vectors"][:, columns:].any()
    assert not new_directions(basis, along(*range(7)), 4).any()  # nothing is left to read


@pytest.mark.parametrize("axes", [3, 8], ids=["basis", "complement"])
def test_new_directions_are_the_first_left_singular_vectors_of_what_is_not_used(axes):
    d, random = 11, np.random.default_rng(1)
    old = random.normal(size=(axes, d))
    basis = grow(empty_basis(d), old.T @ old, 1.0)
    assert basis["complement"] == (axes > d // 2)
    rows = random.normal(size=(40, d)) * np.arange(1, d + 1)
    c = rows.T @ rows
    unused = np.eye(d) - np.linalg.pinv(old) @ old
    vectors, values, _ = np.linalg.svd(unused @ c)
    a = new_directions(basis, c, 2)
    np.testing.assert_allclose(np.abs(a.T @ vectors[:, :2]), np.eye(2), atol=1e-9)
    many = new_directions(basis, c, 6)
    real = min(6, d - axes)
    np.testing.assert_allclose(many.T @ many, np.diag([1.0] * real + [0.0] * (6 - real)),
                               atol=1e-9)
    assert np.abs(old @ many).max() < 1e-9 * np.abs(old).max()


@pytest.mark.parametrize("trace", [0.0, np.nan])
def test_a_session_without_inputs_is_an_error(trace):
    with pytest.raises(ValueError, match="trace"):
        grow(empty_basis(3), trace * np.eye(3), 0.95)


# --- The method -----------------------------------------------------------------------------------


def test_a_linear_model_learns_new_inputs_and_gives_the_old_ones_what_it_gave():
    random, rank, old_directions = np.random.default_rng(2), 3, 4
    old = random.normal(size=(LAYERS, 30, old_directions)) @ random.normal(
        size=(LAYERS, old_directions, WIDTH))
    new = random.normal(size=(LAYERS, 50, WIDTH))
    moments = lambda x: np.einsum("lnd,lne->lde", x, x)
    method = InfLoRA(rank=rank, tasks=2, learning_rate=0.05, first_energy=1.0)
    state = method.init(jax.random.key(0), MODEL, None)
    state = method.begin_task(state, 0, data_of(moments(old)))
    state = method.end_task(state, 0, data_of(moments(old)))
    assert not np.any(state["aux"]["delta"])  # nothing was trained
    assert state["statistics"]["columns"].tolist() == [old_directions] * LAYERS
    state = method.begin_task(state, 1, data_of(moments(new)))

    a = np.asarray(state["aux"]["lora_in"])
    np.testing.assert_allclose(a.swapaxes(1, 2) @ a, np.broadcast_to(
        np.eye(rank) / 3, (LAYERS, rank, rank)), atol=1e-6)
    x, target = jnp.asarray(new, jnp.float32), new @ random.normal(size=(LAYERS, WIDTH, WIDTH))

    def loss(trainable):
        pairs = method.factors(trainable, state["aux"])
        return sum(jnp.square(x @ (p["a"] @ p["b"]) - target).mean() for p in pairs.values())

    trainable = state["trainable"]
    assert {leaf.shape for leaf in jax.tree.leaves(trainable["lora"])} == {(LAYERS, rank, WIDTH)}
    optimizer = make_optimizer(OptimizerConfig(), method, trainable)
    mask = method.update_mask(state)

    @jax.jit
    def step(trainable, opt_state, number):
        value, gradients = jax.value_and_grad(loss)(trainable)
        trainable, opt_state, _ = optimizer.update(gradients, opt_state, trainable, mask, number,
                                                   100)
        return trainable, opt_state, value

    opt_state, values = optimizer.init(trainable), []
    for number in range(100):
        trainable, opt_state, value = step(trainable, opt_state, number)
        values.append(float(value))
    state = method.end_task(state | {"trainable": trainable}, 1, data_of(moments(new)))
    change = np.asarray(state["aux"]["delta"], np.float64)  # [L, 2, d, d]
    assert values[-1] < 0.95 * values[0]
    size = np.linalg.norm(change, axis=(2, 3)).min()
    assert size > 0.1
    for block in range(LAYERS):
        moved = np.linalg.norm(old[block] @ change[block], axis=-1)
        assert (moved <= 1e-5 * np.linalg.norm(old[block], axis=-1) * size).all()
        assert np.linalg.norm(new[block] @ change[block], axis=-1).min(0).max() > 1e-3
    # Kept for good, and added to by nothing until the next session trains.
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state["trainable"]["lora"]))


def test_share_of_energy_rises_over_the_sessions(monkeypatch):
    shares = []
    monkeypatch.setattr(inflora, "grow",
                        lambda basis, moments, share: shares.append(share) or basis)
    method = InfLoRA(rank=2, tasks=4)
    state = method.init(jax.random.key(0), MODEL, None)
    for task in range(4):
        state = method.end_task(state, task, data_of(np.stack([np.eye(WIDTH)] * LAYERS)))
    np.testing.assert_allclose(shares[::LAYERS], [0.95, 0.9625, 0.975, 0.9875])


@pytest.mark.parametrize("settings, message", [
    ({"first_energy": 0.0}, "first_energy and last_energy are 0.0 and 1.0"),
    ({"first_energy": 0.9, "last_energy": 0.8}, "are 0.9 and 0.8"), ({"rank": 0}, "rank is 0")])
def test_settings_out_of_range_are_errors_that_name_them(settings, message):
    with pytest.raises(ValueError, match=message):
        InfLoRA(**settings)
