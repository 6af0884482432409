"""What methods do where there are classes: losses by scikit-learn and NumPy, kept clips, Fisher."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import log_loss

from tail_jax import losses, methods
from tail_jax.methods.ewc import EWC, squared_score
from tests.tiny import TwoTowers

CLASSES, ROWS, REAL = 7, 9, 6
MODEL = TwoTowers(classes=CLASSES)
CURRENT = np.isin(np.arange(CLASSES), [2, 5, 6])
SEEN = CURRENT | np.isin(np.arange(CLASSES), [0, 3])
AUX = {"classes": {"current": CURRENT, "seen": SEEN}, "distil": jnp.float32(1)}


def problem(seed=0):
    """(outputs, batch): logits of a student and a teacher; labels among the current classes."""
    random = np.random.default_rng(seed)
    logits, teacher = random.normal(scale=2, size=(2, ROWS, CLASSES)).astype(np.float32)
    label = random.choice(np.flatnonzero(CURRENT), ROWS).astype(np.int32)
    batch = {"label": label, "mask": np.arange(ROWS) < REAL, "clip_id": np.arange(ROWS)}
    return {"logits": jnp.asarray(logits), "teacher_logits": jnp.asarray(teacher)}, batch


def loss_of(name, outputs, batch, aux=AUX, **settings):
    method = methods.build({"name": name} | settings)
    loss, metrics = method.objective(MODEL, {}, {}, aux, outputs, batch)
    return float(loss), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("on", [CURRENT, SEEN, np.ones(CLASSES, bool)])
def test_cross_entropy_is_among_the_classes_that_are_on(on):
    outputs, batch = problem()
    columns = np.flatnonzero(on)
    p = softmax(np.asarray(outputs["logits"])[:REAL, columns].astype(np.float64), axis=1)
    expected = log_loss(batch["label"][:REAL], p, labels=columns)
    run = lambda logits: losses.classification_loss(logits, batch["label"], on, batch["mask"])
    value, gradient = jax.value_and_grad(run)(outputs["logits"])
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert not np.any(gradient[:, ~on]) and not np.any(gradient[REAL:])
    # d/d logits = (p - one hot) / B
    hot = np.equal.outer(batch["label"][:REAL], columns)
    np.testing.assert_allclose(gradient[:REAL][:, columns], (p - hot) / REAL, atol=1e-6)


def test_sequential_compares_the_classes_of_the_session_and_replay_all_seen():
    outputs, batch = problem(1)
    for name, on in (("sequential", CURRENT), ("er", SEEN)):
        expected = losses.classification_loss(outputs["logits"], batch["label"], on, batch["mask"])
        assert loss_of(name, outputs, batch)[0] == pytest.approx(float(expected))


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_lwf_keeps_the_distribution_over_old_classes(temperature):
    outputs, batch = problem(2)
    old = SEEN & ~CURRENT
    new_log_p, p = (f(np.asarray(outputs[name])[:REAL, old].astype(np.float64) / temperature, 1)
                    for f, name in ((log_softmax, "logits"), (softmax, "teacher_logits")))
    plain, _ = loss_of("sequential", outputs, batch)
    loss, _ = loss_of("lwf", outputs, batch, old_weight=0.3, temperature=temperature)
    assert loss == pytest.approx(plain - 0.3 * (p * new_log_p).sum(1).mean(), rel=1e-5)
    first = AUX | {"distil": jnp.float32(0)}
    assert loss_of("lwf", outputs, batch, first)[0] == pytest.approx(plain)


def test_lwf_pulls_no_logit_when_the_student_is_the_teacher():
    outputs, batch = problem(3)
    method = methods.build({"name": "lwf"})

    def term(logits):
        out = outputs | {"logits": logits}
        return method.objective(MODEL, {}, {}, AUX, out, batch)[1]["old"]

    assert np.abs(jax.grad(term)(outputs["teacher_logits"])).max() < 1e-7
    assert np.abs(jax.grad(term)(outputs["logits"])).max() > 1e-3


def test_der_draws_kept_clips_to_their_stored_logits():
    outputs, batch = problem(4)
    stored = np.random.default_rng(5).normal(size=(ROWS, CLASSES)).astype(np.float32)
    batch |= {"clip_id": np.array([0, 1, -1, -4, 2, -9, -2, 0, 0]), "stored_logits": stored}
    kept = [2, 3, 5]  # row 6 is padding
    gap = ((np.asarray(outputs["logits"]) - stored)[kept] ** 2).mean()
    plain, _ = loss_of("er", outputs, batch)
    assert loss_of("der", outputs, batch, stored_weight=0.3)[0] == pytest.approx(
        plain + 0.3 * gap, rel=1e-5)


def test_memory_keeps_clips_with_their_labels_and_what_the_model_said_of_them():
    method = methods.build({"name": "der", "capacity": 5})
    shape, labels = (3, 2), np.array([4, 2, 4, 6], np.int32)
    reader = types.SimpleNamespace(
        pairs=np.stack([np.arange(4, dtype=np.int32)] * 2, 1), labels=labels,
        split=types.SimpleNamespace(clips=range(4)))
    logits = np.arange(4 * CLASSES, dtype=np.float32).reshape(4, CLASSES)
    data = types.SimpleNamespace(
        reader=reader, seed=3, model=MODEL, map_audio=lambda function, state: logits,
        clips=lambda rows: np.broadcast_to(rows[:, None, None], (len(rows), *shape)))
    state = {"trainable": {}, "aux": {}, "memory": method.memory(MODEL, shape, 0)}
    memory = method.end_task(state, 0, data)["memory"]
    assert memory["mask"].tolist() == [True] * 4 + [False]
    clips = memory["audio"][:4, 0, 0].astype(int)
    assert sorted(clips) == [0, 1, 2, 3]
    assert memory["label"][:4].tolist() == labels[clips].tolist()
    np.testing.assert_array_equal(memory["stored_logits"][:4], logits[clips])
    batch = {"audio": np.full((6, *shape), 9, np.float32), "clip_id": np.arange(6, dtype=np.int32),
             "label": np.full(6, 1, np.int32), "mask": np.ones(6, bool)}
    both = method.replay({"memory": memory}, batch, 2, reader, np.random.default_rng(0))
    assert {k: len(v) for k, v in both.items()} == dict.fromkeys(
        ("audio", "clip_id", "label", "mask", "stored_logits"), 8)
    assert both["label"][6:].tolist() == labels[both["audio"][6:, 0, 0].astype(int)].tolist()
    assert (both["clip_id"][6:] < 0).all() and both["label"][:6].tolist() == [1] * 6


@dataclasses.dataclass(frozen=True)
class LinearEWC(EWC):
    """EWC of a linear classifier, logits = x W."""

    def forward(self, model, trainable, frozen, aux, batch, key):
        return {"logits": batch["x"] @ trainable["w"]}


def test_sampled_fisher_of_a_linear_classifier_is_the_exact_one_in_the_mean():
    random = np.random.default_rng(6)
    x, w = random.normal(size=(ROWS, 3)), random.normal(size=(3, CLASSES))
    # E_y (d log p(y) / dW)^2 = x_i^2 (p_c - p_c^2): of an indicator with mean p_c.
    p = softmax(np.where(CURRENT, x @ w, -np.inf), axis=1)[:REAL]
    exact = np.einsum("bi,bc->ic", x[:REAL] ** 2, p - p**2)
    batch = {"x": x.astype(np.float32), "mask": np.arange(ROWS) < REAL}
    params, draws = {"w": w.astype(np.float32)}, 20000
    run = jax.jit(jax.vmap(
        lambda key: squared_score(LinearEWC(), MODEL, params, {}, AUX, batch, key)["w"]))
    sampled = np.asarray(run(jax.random.split(jax.random.key(0), draws)))
    error = sampled.std(0) / draws**0.5
    assert np.all(np.abs(sampled.mean(0) - exact) <= 4.5 * error)
    assert not sampled[:, :, ~CURRENT].any()  # classes of other sessions are not asked for
