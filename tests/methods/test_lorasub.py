"""LoRASub: the triplet loss by hand and by loops, updates that stay in their subspace, NCM."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from tail_jax.methods.lorasub import LoRASub, triplet_loss
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer

WIDTH, LAYERS, CLASSES = 8, 2, 5
MODEL = DualEncoder(EATConfig(frames=8, mels=8, patch=4, width=WIDTH, layers=LAYERS, heads=2,
                              hidden=12), None, classes=CLASSES)


# --- The loss -------------------------------------------------------------------------------------


def hand_worked(rows, old, margin=1.0):
    features = jnp.asarray([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], jnp.float32)
    prototypes = jnp.asarray([[0, -1], [0, 0], [0, 0]], jnp.float32)
    label = jnp.asarray([1, 1, 2, 2])
    return float(triplet_loss(features, label, jnp.arange(4) < rows, prototypes,
                              jnp.asarray([old, False, False]), margin))


def test_hand_worked_triplets():
    # Squared distances: 0-1 0.8, 0-2 2, 0-3 4, 1-2 0.4, 1-3 3.2, 2-3 2; to the old mean 2, 3.6, 4,
    # 2. Negatives of rows 0 and 1 are 2 and 3.
    p, n = np.sqrt([0.8, 0.8, 2, 2]), np.sqrt([2, 0.4, 0.4, 3.2])
    assert hand_worked(4, False) == pytest.approx(np.maximum(0, 1 + p - n).mean(), rel=1e-6)
    n = np.sqrt([2, 0.4, 0.4, 2])  # the old mean is nearer to row 3 than row 1 is
    assert hand_worked(4, True) == pytest.approx(np.maximum(0, 1 + p - n).mean(), rel=1e-6)
    # Row 2 alone in its class is its own positive.
    p, n = np.sqrt([0.8, 0.8, 0]), np.sqrt([2, 0.4, 0.4])
    assert hand_worked(3, False) == pytest.approx(np.maximum(0, 1 + p - n).mean(), rel=1e-6)
    assert hand_worked(2, False) == 0  # one class, nothing old: no negative
    assert hand_worked(2, True, 0.5) == pytest.approx(
        np.maximum(0, 0.5 + np.sqrt(0.8) - np.sqrt([2, 3.6])).mean(), rel=1e-6)


@pytest.mark.parametrize("olds", [(), (1, 4)])
def test_triplets_of_a_padded_batch_are_those_of_a_loop(olds):
    random, rows, real = np.random.default_rng(3), 13, 9
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    f = unit(random.normal(size=(rows, 4)))
    f[3] = f[5]  # and a pair at distance 0
    prototypes = unit(random.normal(size=(CLASSES, 4)))
    label = random.choice([0, 2, 3], rows)
    label[5] = label[3]
    expected = []
    for i in range(real):
        at = lambda y: np.linalg.norm(f[i] - y)
        positive = max(at(f[j]) for j in range(real) if label[j] == label[i])
        negative = min([at(f[j]) for j in range(real) if label[j] != label[i]]
                       + [at(prototypes[c]) for c in olds])
        expected.append(max(0.0, 0.7 + positive - negative))
    old = jnp.asarray(np.isin(np.arange(CLASSES), olds))
    run = lambda f: triplet_loss(f, jnp.asarray(label), jnp.arange(rows) < real,
                                 jnp.asarray(prototypes, jnp.float32), old, 0.7)
    value, gradient = jax.value_and_grad(run)(jnp.asarray(f, jnp.float32))
    assert float(value) == pytest.approx(np.mean(expected), rel=1e-5)
    assert np.isfinite(gradient).all() and not np.any(gradient[real:]) and np.any(gradient[:real])


# --- The subspace ---------------------------------------------------------------------------------


def begun(method, directions=3):
    """The state at the start of session 2, whose inputs lie in some directions; and these."""
    random = np.random.default_rng(4)
    spans = np.linalg.qr(random.normal(size=(LAYERS, WIDTH, directions)))[0]
    x = random.normal(size=(LAYERS, 40, directions)) @ spans.swapaxes(1, 2)
    data = types.SimpleNamespace(
        model=MODEL, key=jax.random.key(1), fold_audio=lambda function, state, merge: {
            "sum": np.einsum("lnd,lne->lde", x, x)})
    state = method.init(jax.random.key(0), MODEL, None)
    assert method.begin_task(state, 0, data) is state  # session 1 is free
    np.testing.assert_array_equal(state["aux"]["projectors"],
                                  np.broadcast_to(np.eye(WIDTH), (LAYERS, WIDTH, WIDTH)))
    state["statistics"]["counts"][:2] = 3, 1
    state["statistics"]["sums"][:2] = [[3.0] + [0.0] * 7, [0.0, 3.0, 4.0] + [0.0] * 5]
    return method.begin_task(state, 1, data), spans, x


def test_both_factors_stay_in_the_subspace_under_adam():
    method = LoRASub(rank=2, learning_rate=0.5, energy=1.0)
    state, spans, x = begun(method)
    p = spans @ spans.swapaxes(1, 2)
    np.testing.assert_allclose(state["aux"]["projectors"], p / np.sqrt(3), atol=1e-6)
    trainable, mask = state["trainable"], method.update_mask(state)
    optimizer = make_optimizer(OptimizerConfig(), method, trainable)
    inputs = jnp.asarray(x, jnp.float32)

    def loss(trainable):
        pairs = method.factors(trainable, state["aux"])
        return sum(jnp.square(inputs @ (q["a"] @ q["b"]) - 2 * inputs).mean()
                   for q in pairs.values())

    @jax.jit
    def step(trainable, opt_state, number):
        value, gradients = jax.value_and_grad(loss)(trainable)
        after, opt_state, _ = optimizer.update(gradients, opt_state, trainable, mask, number, 100)
        return method.constrain(trainable, after, state["aux"]), opt_state, value

    opt_state, values = optimizer.init(trainable), []
    for number in range(100):
        trainable, opt_state, value = step(trainable, opt_state, number)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    for pair in trainable["lora"]["audio"].values():
        a, b = (np.asarray(pair[name], np.float64) for name in "ab")
        assert np.linalg.norm(a - p @ a) <= 1e-6 * np.linalg.norm(a)
        assert np.linalg.norm(b - b @ p) <= 1e-6 * np.linalg.norm(b) > 0


def test_prototypes_are_unit_means_of_old_classes_and_nothing_else():
    state, _, _ = begun(LoRASub(rank=2))
    expected = np.zeros((CLASSES, WIDTH))
    expected[0, 0], expected[1, 1:3] = 1, (0.6, 0.8)
    np.testing.assert_allclose(state["aux"]["prototypes"], expected, atol=1e-6)


# --- The classifier -------------------------------------------------------------------------------


def test_means_come_from_each_session_and_the_largest_cosine_wins():
    random, method = np.random.default_rng(6), LoRASub(rank=2)
    state, seen, rows = method.init(jax.random.key(0), MODEL, None), [], {}
    for task, classes in enumerate(((3, 0), (1,))):
        labels = np.repeat(classes, 3)
        z = random.normal(size=(len(labels), WIDTH)) + 3 * labels[:, None]
        data = types.SimpleNamespace(model=MODEL, key=jax.random.key(task), labels=labels,
                                     map_audio=lambda function, state, z=z: z)
        state = method.end_task(state, task, data)
        rows |= {c: z[labels == c].mean(0) for c in classes}
        seen += classes
    test = random.normal(size=(7, WIDTH))
    scores = method.decide(state, test)
    np.testing.assert_allclose(scores[:, seen], cosine_similarity(
        test, [rows[c] for c in seen]), atol=1e-9)
    assert (scores[:, [2, 4]] == -np.inf).all()


def test_loss_adds_the_triplets_of_old_classes_alone():
    method, random = LoRASub(triplet_weight=0.3), np.random.default_rng(7)
    state, _, _ = begun(LoRASub(rank=2))
    current, seen = np.arange(CLASSES) == 2, np.arange(CLASSES) < 3
    aux = state["aux"] | {"classes": {"current": current, "seen": seen}}
    audio = random.normal(size=(4, WIDTH)).astype(np.float32)
    audio /= np.linalg.norm(audio, axis=1, keepdims=True)
    batch = {"label": np.full(4, 2), "mask": np.ones(4, bool)}
    loss, metrics = method.objective(MODEL, {}, {}, aux, {
        "audio": audio, "logits": jnp.zeros((4, CLASSES))}, batch)
    triplet = triplet_loss(audio, batch["label"], batch["mask"], aux["prototypes"],
                           jnp.asarray(seen & ~current), 1.0)
    assert float(triplet) > 0  # one class in the batch: the negatives are old means
    assert float(metrics["triplet"]) == pytest.approx(float(triplet))
    assert float(loss) == pytest.approx(0.3 * float(triplet))  # one class: no cross-entropy
