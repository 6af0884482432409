"""Losses against loops in NumPy, closed forms and hand-worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from tail_jax import losses

SIZES = pytest.mark.parametrize("rows, dimension, padding", [(7, 5, 0), (7, 5, 2), (1, 3, 0),
                                                             (13, 8, 5)])


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def problem(rows, dimension, padding, seed=0):
    """Embeddings of two steps, ids with repeats (different for clips and captions), a mask."""
    rng = np.random.default_rng(seed)
    a, t, a_old, t_old = unit(rng, 4, rows, dimension)
    clip = rng.integers(0, max(rows // 2, 1), rows).astype(np.int32)
    caption = rng.integers(0, rows, rows).astype(np.int32)
    mask = np.arange(rows) < rows - padding
    return a, t, a_old, t_old, clip, caption, mask


def brute_retrieval(s, clip, caption, mask):
    """The loss by loops over the real rows alone."""
    real = np.flatnonzero(mask)
    s, n, total = s[np.ix_(real, real)], len(real), 0.0
    for direction in (s, s.T):
        for i in range(n):
            same = [j for j in range(n) if clip[real[i]] == clip[real[j]]
                    or caption[real[i]] == caption[real[j]]]
            total -= np.mean(log_softmax(direction[i])[same])
    return total / (2 * n)


def kl(p_logits, q_logits):
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum()


def retrieval(a, t, scale, clip, caption, mask):
    batch = {"clip_id": clip, "caption_key": caption, "mask": mask}
    return losses.retrieval_loss(a, t, scale, batch)


@SIZES
def test_retrieval_loss_equals_loops_over_real_rows(rows, dimension, padding):
    a, t, _, _, clip, caption, mask = problem(rows, dimension, padding)
    got = retrieval(a, t, jnp.log(9.0), clip, caption, mask)
    s = 9.0 * a.astype(np.float64) @ t.T
    assert float(got) == pytest.approx(brute_retrieval(s, clip, caption, mask), abs=1e-5)


def test_positives_share_clip_or_caption_among_real_rows():
    rows = {"clip_id": jnp.array([0, 0, 1, 2, 0]), "caption_key": jnp.array([5, 6, 7, 6, 5]),
            "mask": jnp.array([True, True, True, True, False])}
    g = losses.positives(rows, rows)
    np.testing.assert_array_equal(g, [[1, 1, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 1, 0, 0],
                                      [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])


def test_single_positives_give_the_closed_form_of_infonce():
    # S = [[1, 0], [0, 1]] * s: every row loses log(1 + e^-s).
    eye = np.eye(2, dtype=np.float32)
    ids = jnp.arange(2)
    for scale in (1.0, 3.0):
        got = retrieval(eye, eye, jnp.log(scale), ids, ids, jnp.ones(2, bool))
        assert float(got) == pytest.approx(np.log1p(np.exp(-scale)), abs=1e-6)


def test_similarity_scale_stops_at_100():
    one = jnp.ones((1, 1))
    assert float(losses.similarity(one, one, jnp.log(50.0))[0, 0]) == pytest.approx(50, rel=1e-5)
    assert float(losses.similarity(one, one, jnp.asarray(9.0))[0, 0]) == 100.0


@SIZES
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_similarity_distillation_equals_loops_over_real_rows(rows, dimension, padding,
                                                             temperature):
    a, t, a_old, t_old, _, _, mask = problem(rows, dimension, padding)
    s, s_old = 9.0 * a @ t.T, 4.0 * a_old @ t_old.T  # each side with its own scale
    got = losses.similarity_distillation((a, t, jnp.log(9.0)), (a_old, t_old, jnp.log(4.0)), mask,
                                         temperature)
    real = np.flatnonzero(mask)
    new, old = (x[np.ix_(real, real)].astype(np.float64) / temperature for x in (s, s_old))
    total = sum(kl(old[i], new[i]) + kl(old[:, i], new[:, i]) for i in range(len(real)))
    assert float(got) == pytest.approx(temperature**2 * total / (2 * len(real)), abs=1e-5)


def test_similarity_distillation_of_a_hand_worked_table():
    # Teacher rows and columns are (3/4, 1/4) and (1/4, 3/4), the student's all (1/2, 1/2):
    # every KL is log 2 - H(1/4) = 0.130812, so L = T^2 * 4 * 0.130812 / (2 * 2) at T = 1.
    eye, one = jnp.eye(2), jnp.zeros(())
    teacher = np.log(3.0) * eye
    flat = (0 * eye, eye, one)
    got = losses.similarity_distillation(flat, (teacher, eye, one), jnp.ones(2, bool), 1.0)
    assert float(got) == pytest.approx(0.130812, abs=1e-6)
    # At T = 2 the same probabilities need twice the logits, and the factor is 4.
    got = losses.similarity_distillation(flat, (2 * teacher, eye, one), jnp.ones(2, bool), 2.0)
    assert float(got) == pytest.approx(4 * 0.130812, abs=4e-6)


@SIZES
@pytest.mark.parametrize("form", losses.FEATURE_FORMS)
def test_feature_distillation_equals_loops_over_real_rows(rows, dimension, padding, form):
    z, _, z_old, _, _, _, mask = problem(rows, dimension, padding)
    got = losses.feature_distillation(z, z_old, mask, 1.5, form)
    rows_of = {"kl": lambda p, q: 1.5**2 * kl(p * dimension**0.5 / 1.5, q * dimension**0.5 / 1.5),
               "cosine": lambda p, q: 1 - p @ q, "mse": lambda p, q: ((p - q)**2).sum()}[form]
    expected = np.mean([rows_of(z_old[i].astype(np.float64), z[i].astype(np.float64))
                        for i in np.flatnonzero(mask)])
    assert float(got) == pytest.approx(expected, abs=1e-5)


def test_feature_kl_is_about_one_minus_cosine():
    # Specification, 3.2: with the sqrt(d) a modality's term is near 1 - cos, at d = 512.
    rng = np.random.default_rng(1)
    old = unit(rng, 64, 512)
    noise = rng.normal(size=old.shape)
    noise -= (noise * old).sum(1, keepdims=True) * old
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    new = (0.9 * old + np.sqrt(1 - 0.81) * noise).astype(np.float32)
    got = float(losses.feature_distillation(new, old, np.ones(64, bool), 2.0))
    assert 0.08 < got < 0.12


@pytest.mark.parametrize("form", losses.FEATURE_FORMS)
def test_distillation_from_oneself_is_zero_with_zero_gradient(form):
    a, t, _, _, _, _, mask = problem(6, 5, 1)
    teacher = a, t, jnp.log(20.0)

    def both(student, z):
        return (losses.similarity_distillation(student, teacher, mask, 2.0)
                + losses.feature_distillation(z, a, mask, 2.0, form))

    value, (gradients, feature) = jax.value_and_grad(both, argnums=(0, 1))(teacher, jnp.asarray(a))
    assert abs(float(value)) < 1e-6
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=5e-6)  # of scores, times a scale of 20
    if form != "cosine":  # 1 - <z', z> pulls along z itself, which the unit norm takes out
        np.testing.assert_allclose(feature, 0, atol=1e-6)


@pytest.mark.parametrize("form", losses.FEATURE_FORMS)
def test_padded_rows_change_neither_value_nor_gradient(form):
    a, t, a_old, t_old, clip, caption, mask = problem(9, 5, 3)

    def total(a, t, scale, a_old, t_old, clip, caption, mask):
        old = a_old, t_old, jnp.log(5.0)
        return (retrieval(a, t, scale, clip, caption, mask)
                + losses.similarity_distillation((a, t, scale), old, mask, 2.0)
                + losses.feature_distillation(a, a_old, mask, 2.0, form)
                + losses.feature_distillation(t, t_old, mask, 2.0, form))

    run = jax.value_and_grad(total, argnums=(0, 1, 2))
    scale, real = jnp.log(20.0), slice(0, 6)
    value, (ga, gt, gs) = run(a, t, scale, a_old, t_old, clip, caption, mask)
    few, (fa, ft, fs) = run(a[real], t[real], scale, a_old[real], t_old[real], clip[real],
                            caption[real], mask[real])
    assert float(value) == pytest.approx(float(few), abs=1e-6)
    assert float(gs) == pytest.approx(float(fs), abs=1e-6)
    for padded, alone in ((ga, fa), (gt, ft)):
        np.testing.assert_allclose(padded[real], alone, atol=1e-6)
        np.testing.assert_array_equal(padded[6:], 0)
    # Nor does what stands in them, even where it looks like a positive.
    clip[6:], caption[6:], a[6:], t[6:] = clip[0], caption[0], a[0], -t[0]
    assert float(run(a, t, scale, a_old, t_old, clip, caption, mask)[0]) == pytest.approx(
        float(value), abs=1e-6)


def test_a_batch_of_padding_alone_is_zero():
    a, t, a_old, t_old, clip, caption, _ = problem(3, 5, 0)
    mask = np.zeros(3, bool)
    run = jax.value_and_grad(lambda a: retrieval(a, t, 1.0, clip, caption, mask)
                             + losses.feature_distillation(a, a_old, mask, 2.0)
                             + losses.similarity_distillation((a, t, 1.0), (a_old, t_old, 1.0),
                                                              mask, 2.0))
    value, gradient = run(jnp.asarray(a))
    assert float(value) == 0 and (np.asarray(gradient) == 0).all()


def test_unknown_feature_form_is_an_error():
    with pytest.raises(ValueError, match="form is 'l1'"):
        losses.feature_distillation(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones(1, bool), 1.0,
                                    "l1")
