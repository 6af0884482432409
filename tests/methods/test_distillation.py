"""LwF in both forms and Mod-X, against NumPy with loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax import methods
from tests.tiny import TwoTowers

NAMES = ("lwf_feature", "lwf_similarity", "modx")
REAL = {3: 3, 5: 4, 8: 6}
KEYS = ("audio", "text", "teacher_audio", "teacher_text")


def outputs(rows, seed=0, dimension=6, spread=1.0):
    """Unit embeddings; the teacher's lie `spread` away from the student's."""
    random = np.random.default_rng(seed)
    new = random.normal(size=(2, rows, dimension))
    # Pairs belong together, so that a teacher ranks some of them first.
    new[1] = 0.6 * new[0] + 0.4 * new[1]
    both = np.concatenate([new, new + spread * random.normal(size=new.shape)])
    both /= np.linalg.norm(both, axis=-1, keepdims=True)
    return dict(zip(KEYS, both.astype(np.float32)))


def loss_and_metrics(name, rows, out, distil=1.0, scales=(1.5, 0.7), **settings):
    method = methods.build({"name": name} | settings)
    batch = {"clip_id": np.arange(rows), "caption_key": np.arange(rows),
             "mask": np.arange(rows) < REAL[rows]}
    aux = {"teacher": {"logit_scale": jnp.float32(scales[1])}, "distil": jnp.float32(distil)}
    trainable = {"logit_scale": jnp.float32(scales[0])}
    out = jax.tree.map(jnp.asarray, out)
    loss, metrics = method.objective(TwoTowers(), trainable, {}, aux, out, batch)
    gradient = jax.grad(lambda a: method.objective(
        TwoTowers(), trainable, {}, aux, out | {"audio": a}, batch)[0])(out["audio"])
    return float(loss), {k: float(v) for k, v in metrics.items()}, np.asarray(gradient)


def term(name, *args, **kwargs):
    """The teacher's term without its weight."""
    metrics = loss_and_metrics(name, *args, **kwargs)[1]
    [value] = [v for k, v in metrics.items() if k != "retrieval"]
    return value


def softmax(row):
    e = np.exp(row - row.max())
    return e / e.sum()


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", REAL)
def test_term_is_zero_for_an_unchanged_student_and_positive_for_another(name, rows):
    same = outputs(rows, spread=0.0)
    assert term(name, rows, same, scales=(1.0, 1.0)) == pytest.approx(0, abs=1e-6)
    assert term(name, rows, outputs(rows, spread=0.3)) > 1e-4


@pytest.mark.parametrize("name, weight", [
    ("lwf_feature", "feature_weight"), ("lwf_similarity", "similarity_weight"),
    ("modx", "alignment_weight")])
def test_term_counts_by_its_weight_and_not_at_all_in_the_first_task(name, weight):
    out = outputs(5)
    plain, _, gradient = loss_and_metrics("sequential", 5, out)
    loss, _, moved = loss_and_metrics(name, 5, out, **{weight: 0.25})
    assert loss == pytest.approx(plain + 0.25 * term(name, 5, out), abs=1e-5)
    assert np.abs(moved - gradient).max() > 1e-4
    loss, _, moved = loss_and_metrics(name, 5, out, distil=0.0, **{weight: 0.25})
    assert loss == pytest.approx(plain, abs=1e-6)
    np.testing.assert_allclose(moved, gradient, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_padding_has_no_part_in_it(name):
    out = outputs(5)
    other = {k: np.where(np.arange(5)[:, None] < REAL[5], v, np.roll(v, 1, 1))
             for k, v in out.items()}
    first, second = (loss_and_metrics(name, 5, x) for x in (out, other))
    assert first[0] == pytest.approx(second[0], abs=1e-6)
    assert not second[2][REAL[5]:].any() and np.isfinite(second[2]).all()


@pytest.mark.parametrize("rows", REAL)
def test_feature_term_is_the_mean_squared_distance_of_both_sides(rows):
    out, n = outputs(rows), REAL[rows]
    expected = sum(((out[k][i] - out[f"teacher_{k}"][i]) ** 2).sum()
                   for i in range(n) for k in ("audio", "text")) / n
    assert term("lwf_feature", rows, out) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", REAL)
@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_similarity_term_is_the_kl_of_rows_and_columns(rows, temperature):
    out, n = outputs(rows), REAL[rows]
    new = np.exp(1.5) * out["audio"][:n].astype(np.float64) @ out["text"][:n].T
    old = np.exp(0.7) * out["teacher_audio"][:n].astype(np.float64) @ out["teacher_text"][:n].T
    total = sum(kl(softmax(p / temperature), softmax(q / temperature))
                for x, y in ((old, new), (old.T, new.T)) for p, q in zip(x, y))
    expected = temperature**2 * total / (2 * n)
    assert term("lwf_similarity", rows, out, similarity_temperature=temperature) == pytest.approx(
        expected, rel=1e-4)


@pytest.mark.parametrize("rows", REAL)
@pytest.mark.parametrize("offdiag_only", [False, True])
def test_modx_keeps_the_rows_whose_pair_the_teacher_ranks_first(rows, offdiag_only):
    out, n = outputs(rows, seed=2), REAL[rows]
    new = out["audio"][:n].astype(np.float64) @ out["text"][:n].T
    old = out["teacher_audio"][:n].astype(np.float64) @ out["teacher_text"][:n].T
    expected, kept = 0.0, []
    for x, y in ((old, new), (old.T, new.T)):
        for i in range(n):
            kept.append(all(x[i, i] >= x[i, j] for j in range(n)))
            if kept[-1]:
                among = [j for j in range(n) if j != i or not offdiag_only]
                expected += kl(softmax(x[i, among]), softmax(y[i, among])) / 2
    assert any(kept) and not all(kept)
    got = term("modx", rows, out, offdiag_only=offdiag_only)
    assert got == pytest.approx(expected, rel=1e-4)


def test_modx_gives_no_loss_where_the_teacher_was_wrong():
    out = outputs(5)
    out["teacher_text"] = np.roll(out["teacher_audio"], 1, axis=0)
    out["teacher_audio"][4] = out["teacher_text"][4] = np.eye(6)[0]  # padding
    out["teacher_text"][0] = out["teacher_audio"][3]  # every text is another clip's
    plain, _, gradient = loss_and_metrics("sequential", 5, out)
    loss, _, moved = loss_and_metrics("modx", 5, out)
    assert loss == pytest.approx(plain, abs=1e-6)
    np.testing.assert_allclose(moved, gradient, atol=1e-7)


def test_temperature_that_is_not_positive_is_an_error():
    with pytest.raises(ValueError, match="method.similarity_temperature is 0"):
        methods.build({"name": "lwf_similarity", "similarity_temperature": 0})
