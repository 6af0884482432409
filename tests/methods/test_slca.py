"""SLCA: rates of the two groups, what is drawn, and a broken classifier made whole."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.methods import slca
from tail_jax.methods.slca import SLCA, draw, gaussian, normalised
from tail_jax.tuning.masks import apply_rules

CLASSES, WIDTH = 6, 5
MODEL = types.SimpleNamespace(classes=CLASSES, embedding=WIDTH)


def test_backbone_learns_at_a_hundredth_of_the_classifier():
    tree = {"audio": {"encoder": {"layer_00": {"key": {"kernel": 0}}}, "cls": 0},
            "heads": {"classes": {"kernel": 0, "bias": 0}}}
    rates = apply_rules(tree, SLCA().learning_rates())
    assert set(jax.tree.leaves(rates["audio"])) == {1e-4}
    assert set(jax.tree.leaves(rates["heads"])) == {1e-2}


# --- Gaussians ------------------------------------------------------------------------------------


def test_mean_and_factor_are_those_of_the_clips():
    z = np.random.default_rng(0).normal(size=(9, WIDTH)) * np.arange(1, WIDTH + 1)
    mean, factor = gaussian(z, WIDTH)
    np.testing.assert_allclose(mean, z.mean(0))
    np.testing.assert_allclose(factor.T @ factor, np.cov(z.T), atol=1e-12)
    few, factor = z[:3], gaussian(z[:3], 4)[1]  # two rows say all of three clips
    np.testing.assert_allclose(factor.T @ factor, np.cov(few.T), atol=1e-12)
    assert factor.shape == (4, WIDTH) and np.abs(factor[2:]).max() < 1e-12
    values, vectors = np.linalg.eigh(np.cov(z.T))
    best = vectors[:, -2:] * values[-2:] @ vectors[:, -2:].T
    factor = gaussian(z, 2)[1]
    np.testing.assert_allclose(factor.T @ factor, best, atol=1e-9)
    mean, factor = gaussian(z[:1], WIDTH)
    assert not factor.any() and np.array_equal(mean, z[0])


def statistics_of(rows, sessions, directions=WIDTH):
    """Of {class: its features}, and {class: its session}."""
    out = {"means": np.zeros((CLASSES, WIDTH), np.float32),
           "factors": np.zeros((CLASSES, directions, WIDTH), np.float32),
           "session": np.zeros(CLASSES, np.int64)}
    for number, z in rows.items():
        out["means"][number], out["factors"][number] = gaussian(z, directions)
        out["session"][number] = sessions[number]
    return out


def test_draws_have_the_mean_and_covariance_of_the_equation():
    random, count = np.random.default_rng(1), 40000
    rows = {c: random.normal(size=(8, WIDTH)) + 5 * c for c in (4, 0, 2)}
    sessions = {4: 1, 0: 2, 2: 3}
    z, labels = draw(statistics_of(rows, sessions), count, np.random.default_rng(2))
    assert z.dtype == np.float32 and labels.tolist() == [0] * count + [2] * count + [4] * count
    for number, session in sessions.items():
        own, covariance = z[labels == number], np.cov(rows[number].T) + 1e-4 * np.eye(WIDTH)
        mean = (0.9 + 0.1 * session / 3) * rows[number].mean(0)
        error = np.sqrt(np.diag(covariance) / count)
        assert (np.abs(own.mean(0) - mean) < 5 * error).all()
        np.testing.assert_allclose(np.cov(own.T), covariance, atol=0.03 * covariance.max())


def test_one_clip_is_drawn_about_itself():
    z, _ = draw(statistics_of({3: np.ones((1, WIDTH))}, {3: 1}), 1000, np.random.default_rng(3))
    np.testing.assert_allclose(z.mean(0), 1, atol=2e-3)
    np.testing.assert_allclose(z.std(0), 0.01, rtol=0.1)


# --- The alignment --------------------------------------------------------------------------------


def test_logits_are_over_the_mean_norm_of_the_sessions():
    logits = np.random.default_rng(4).normal(size=(7, CLASSES)).astype(np.float32)
    session = np.array([2, 0, 1, 2, 0, 3])
    norms = [np.linalg.norm(logits[:, session == s], axis=1) for s in (1, 2, 3)]
    expected = logits / (0.1 * np.mean(norms, axis=0))[:, None]
    np.testing.assert_allclose(normalised(logits, session, 0.1), expected, rtol=1e-5)
    gradient = jax.grad(lambda x: normalised(x, jnp.asarray(session), 0.1).sum())
    assert np.isfinite(gradient(jnp.zeros((2, CLASSES)))).all()  # a classifier of zeros


def accuracy(head, rows):
    seen = sorted(rows)
    return np.mean([seen[k] == c for c, z in rows.items() for k in (
        z @ np.asarray(head["kernel"])[:, seen] + np.asarray(head["bias"])[seen]).argmax(1)])


def test_alignment_mends_a_broken_classifier_from_statistics_alone_by_one_program():
    random = np.random.default_rng(5)
    means = 4 * np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]
    rows = {c: means[i] + random.normal(0, 0.5, (30, WIDTH)) for i, c in enumerate((4, 1, 0, 3))}
    sessions = {4: 1, 1: 1, 0: 2, 3: 3}
    kernel = np.zeros((WIDTH, CLASSES), np.float32)
    for wrong, c in zip((1, 0, 3, 4), (4, 1, 0, 3)):  # each class has the weights of another
        kernel[:, wrong] = rows[c].mean(0) / 10
    kernel[:, [2, 5]] = random.normal(size=(WIDTH, 2))  # classes to come
    head = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(CLASSES)}
    method = SLCA(samples=64, align_epochs=12, head_learning_rate=0.05)
    assert accuracy(head, rows) < 0.1
    compiled = slca._align_step._cache_size()
    first = {c: z for c, z in rows.items() if sessions[c] == 1}
    method.align(head, statistics_of(first, sessions), np.random.default_rng(6))
    aligned = method.align(head, statistics_of(rows, sessions), np.random.default_rng(6))
    assert slca._align_step._cache_size() == compiled + 1  # for two classes and for four
    assert accuracy(aligned, rows) > 0.98
    np.testing.assert_array_equal(np.asarray(aligned["kernel"])[:, [2, 5]], kernel[:, [2, 5]])
    np.testing.assert_array_equal(head["kernel"], kernel)  # the caller's arrays are whole


def test_statistics_are_those_of_the_session_that_brought_the_class():
    random, method = np.random.default_rng(7), SLCA(samples=4, align_epochs=1, directions=3)
    heads = {"classes": {"kernel": np.ones((WIDTH, CLASSES), np.float32),
                         "bias": np.zeros(CLASSES, np.float32)}}
    state = method.init(jax.random.key(0), MODEL, {"audio": {}, "heads": heads})
    np.testing.assert_equal(state["statistics"], statistics_of({}, {}, 3))
    z = {}
    for task, labels in enumerate(([2, 2, 5, 2], [0, 0, 0])):
        z[task] = random.normal(size=(len(labels), WIDTH))
        data = types.SimpleNamespace(labels=np.array(labels), seed=task,
                                     map_audio=lambda function, state, task=task: z[task])
        before = {k: np.array(v) for k, v in state["statistics"].items()}
        new = method.end_task(state, task, data)
        np.testing.assert_equal(state["statistics"], before)  # the hook is pure
        state = new
    kept = state["statistics"]
    assert kept["session"].tolist() == [2, 0, 1, 0, 0, 1]
    np.testing.assert_allclose(kept["means"][2], z[0][[0, 1, 3]].mean(0), rtol=1e-5)
    np.testing.assert_allclose(kept["factors"][0].T @ kept["factors"][0], np.cov(z[1].T),
                               atol=1e-5)
    assert not np.array_equal(state["trainable"]["heads"]["classes"]["kernel"],
                              heads["classes"]["kernel"])
