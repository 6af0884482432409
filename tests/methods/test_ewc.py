"""Online EWC: its penalty, and its Fisher against the exact one of two linear towers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from tail_jax.methods.ewc import EWC, squared_score
from tail_jax.methods.full import Sequential
from tests.tiny import TwoTowers

ROWS, REAL = 5, 4


class Linear:
    """Towers that are a matrix each: a = x A, t = y T, not brought to unit length."""

    def forward(self, model, trainable, frozen, aux, batch, key):
        return {"audio": batch["x"] @ trainable["audio"], "text": batch["y"] @ trainable["text"]}


@dataclasses.dataclass(frozen=True)
class LinearEWC(Linear, EWC):
    """EWC of them."""


@dataclasses.dataclass(frozen=True)
class LinearSequential(Linear, Sequential):
    """Plain fine-tuning of them."""


def tree(seed):
    random = np.random.default_rng(seed)
    return {"audio": random.uniform(0.1, 1, (3, 2)).astype(np.float32),
            "text": random.uniform(-1, 1, (4, 2)).astype(np.float32),
            "logit_scale": np.float32(0.4)}


def make_batch():
    random = np.random.default_rng(1)
    return {"x": random.normal(size=(ROWS, 3)).astype(np.float32),
            "y": random.normal(size=(ROWS, 4)).astype(np.float32),
            "clip_id": np.arange(ROWS), "caption_key": np.arange(ROWS),
            "mask": np.arange(ROWS) < REAL}


class Data:
    """A task of one batch, over and over."""

    model, frozen, key, batch_size = TwoTowers(), {}, jax.random.key(5), ROWS
    asked = None

    def batches(self, count):
        self.asked = count
        return iter([make_batch()] * count)


def test_penalty_is_zero_at_the_optimum_and_its_curvature_is_the_fisher():
    method = EWC(penalty_weight=3.0)
    fisher, optimum = jax.tree.map(np.abs, tree(2)), tree(3)
    flat, unflatten = ravel_pytree(optimum)
    penalty = lambda x: method.penalty(unflatten(x), {"fisher": fisher, "optimum": optimum})
    assert float(penalty(flat)) == 0 and not np.any(jax.grad(penalty)(flat))
    hessian = jax.jit(jax.hessian(penalty))(flat)
    expected = 3.0 * np.diag(ravel_pytree(fisher)[0])
    np.testing.assert_allclose(hessian, expected, rtol=1e-6)
    # Quadratic, so that value and curvature say all of it.
    step = np.linspace(-1, 2, len(flat), dtype=np.float32)
    assert float(penalty(flat + step)) == pytest.approx(step @ expected @ step / 2, rel=1e-4)


def test_first_task_has_the_loss_of_sequential_and_later_ones_the_penalty():
    start, moved, batch = tree(4), tree(5), make_batch()
    state = LinearEWC().init(jax.random.key(0), None, start)

    def loss(method, trainable, aux):
        outputs = method.forward(TwoTowers(), trainable, {}, aux, batch, None)
        return float(method.objective(TwoTowers(), trainable, {}, aux, outputs, batch)[0])

    plain = loss(LinearSequential(), moved, {})
    assert loss(LinearEWC(), moved, state["aux"]) == plain
    aux = {"fisher": jax.tree.map(np.ones_like, start), "optimum": start}
    distance = sum(((a - b) ** 2).sum()
                   for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(start)))
    assert loss(LinearEWC(penalty_weight=0.5), moved, aux) == pytest.approx(
        plain + distance / 4, rel=1e-5)


def exact_fisher(params, batch):
    """sum over queries and answers of p (grad log p)^2, grad log p = grad S_ij - E_k grad S_ik."""
    x, y = (batch[k][:REAL].astype(np.float64) for k in "xy")
    a, t, scale = x @ params["audio"], y @ params["text"], np.exp(params["logit_scale"])
    s = scale * a @ t.T
    total = jax.tree.map(lambda p: np.zeros(np.shape(p)), params)
    for of_audio in (True, False):
        for i in range(REAL):
            pairs = [(i, j) if of_audio else (j, i) for j in range(REAL)]
            p = np.exp([s[pair] for pair in pairs])
            p /= p.sum()
            slopes = [{"audio": scale * np.outer(x[k], t[l]), "text": scale * np.outer(y[l], a[k]),
                       "logit_scale": s[k, l]} for k, l in pairs]
            for name in total:
                mean = sum(q * slope[name] for q, slope in zip(p, slopes))
                total[name] += sum(q * (slope[name] - mean) ** 2 for q, slope in zip(p, slopes))
    return total


def test_sampled_fisher_is_the_exact_one_in_the_mean():
    params, batch, draws = tree(6), make_batch(), 20000
    run = jax.jit(jax.vmap(
        lambda key: squared_score(LinearEWC(), TwoTowers(), params, {}, {}, batch, key)))
    sampled = jax.device_get(run(jax.random.split(jax.random.key(7), draws)))
    for name, exact in exact_fisher(params, batch).items():
        error = sampled[name].std(0) / draws**0.5
        assert np.all(error < 0.05 * exact), name
        assert np.all(np.abs(sampled[name].mean(0) - exact) < 4.5 * error), name


def test_fisher_is_decayed_and_averaged_over_queries():
    method, data, params = LinearEWC(decay=0.5, queries=25), Data(), tree(8)
    state = jax.tree.map(jnp.array, method.init(jax.random.key(0), None, params))
    once = method.end_task(state, 0, data)
    assert data.asked == 3  # of two queries a row: 30, of which 24 are real
    total = [squared_score(method, TwoTowers(), params, {}, {}, make_batch(),
                           jax.random.fold_in(Data.key, i)) for i in range(3)]
    expected = jax.tree.map(lambda *x: sum(x) / (3 * 2 * REAL), *total)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, once["aux"]["fisher"], expected)
    twice = method.end_task(once, 1, data)
    jax.tree.map(lambda a, b: close(a, 1.5 * b), twice["aux"]["fisher"], expected)


def test_optimum_is_a_copy_of_what_the_task_ended_in():
    method, params = LinearEWC(queries=1), tree(9)
    state = jax.tree.map(jnp.array, method.init(jax.random.key(0), None, params))
    state["trainable"] = jax.tree.map(lambda x: x + 1, state["trainable"])
    ended = method.end_task(state, 0, Data())
    jax.tree.map(lambda x: x.delete(), ended["trainable"])  # as donation does
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), ended["aux"]["optimum"],
                 params)


def test_queries_out_of_range_are_an_error():
    with pytest.raises(ValueError, match="method.queries is 0; expected 1 or more"):
        EWC(queries=0)
