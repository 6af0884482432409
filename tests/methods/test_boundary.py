"""The boundary-aware loss: its values by hand, masked copies, the ridge against scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from tail_jax.methods import boundary

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(7)


@jax.jit
def masked(audio, ids, copy, fill):
    return boundary.masked_copy(audio, ids, copy, KEY, fill)


def copies_of(audio, ids, copy, fill=0.0):
    return np.asarray(masked(jnp.asarray(audio, jnp.float32), jnp.asarray(ids, jnp.int32),
                             jnp.broadcast_to(copy, len(ids)), fill))


# --- Masked copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("frames, mels", [(512, 128), (37, 13)])
def test_a_copy_has_one_band_of_each_axis_of_a_tenth_to_three_tenths(frames, mels):
    ids = np.arange(40, dtype=np.int32)
    out = copies_of(np.ones((40, frames, mels)), ids, 3, fill=-4.25)
    masked = out == -4.25
    assert ((out == 1) | masked).all()
    for axis, length in ((1, frames), (2, mels)):
        line = masked.all(axis=3 - axis)  # frames that are masked in all mels, and the other way
        width = line.sum(1)
        assert width.min() >= round(0.1 * length) and width.max() <= round(0.3 * length)
        assert len(np.unique(width)) > 2 and abs(width.mean() / length - 0.2) < 0.04
        assert (np.abs(np.diff(line.astype(int), axis=1)).sum(1) <= 2).all()  # one stretch
        assert line[:, 0].any() or line[:, -1].any() or length > 100  # bands reach the ends
    # Nothing else is masked: the union of the two bands.
    union = masked.all(2)[:, :, None] | masked.all(1)[:, None, :]
    np.testing.assert_array_equal(masked, union)


def test_copies_are_a_function_of_clip_and_number_alone():
    audio = np.random.default_rng(0).normal(size=(5, 20, 10))
    ids, order = np.array([4, 0, 9, 2, 7], np.int32), np.array([2, 0, 4, 3, 3])
    whole = copies_of(audio, ids, 1)
    np.testing.assert_array_equal(copies_of(audio[order], ids[order], 1), whole[order])
    np.testing.assert_array_equal(copies_of(audio, ids, np.array([1, 0, 1, 1, 0]))[[0, 2, 3]],
                                  whole[[0, 2, 3]])
    same = np.ones((5, 20, 10))
    bands = [copies_of(same, np.full(5, 3), np.arange(5)), copies_of(same, ids, 1)]
    for rows in bands:  # other numbers, other clips: other bands
        assert len({row.tobytes() for row in rows}) == 5


def test_an_axis_of_few_frames_still_loses_one():
    assert (copies_of(np.ones((3, 2, 2)), np.arange(3), 0) == 0).any(axis=(1, 2)).all()


# --- The boundary -------------------------------------------------------------------------------


@pytest.mark.parametrize("n, d", [(9, 30), (40, 6)])
@pytest.mark.parametrize("ridge", [1e-2, 0.3])
def test_ridge_is_that_of_scikit_learn(n, d, ridge):
    random = np.random.default_rng(1)
    x, new = random.normal(3, 1, (n, d)), random.normal(3, 1, (50, d))
    labels = random.choice([2, 5, 11], n)
    classes = np.unique(labels)
    alpha = ridge * np.square(x - x.mean(0)).sum(1).mean()
    theirs = Ridge(alpha=alpha, fit_intercept=True).fit(x, np.eye(12)[labels][:, classes])
    expected = classes[theirs.predict(new).argmax(1)]
    np.testing.assert_array_equal(boundary.ridge_predictions(x, labels, new, ridge), expected)
    assert len(np.unique(expected)) > 1


def test_wrong_copies_of_prone_clips_make_the_boundary():
    # Two classes on an axis: what lies on the other side is wrong.
    features, labels = np.array([[-1.0, 0], [-1, 0.1], [1, 0], [1, -0.1]]), np.array([8, 8, 3, 3])
    side = np.array([[-1, -1, -1, -1, -1, -1, -1, -1, -1, -1],
                     [1, 1, 1, -1, -1, -1, -1, -1, -1, -1],   # 0.3 wrong is not more than 0.3
                     [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1],      # 0.4 is
                     [-1, -1, -1, -1, -1, -1, -1, -1, -1, -1]])
    copies = np.stack([side * 0.7, np.zeros_like(side)], -1)
    found = boundary.boundary_copies(features, labels, copies, wrong_share=0.3)
    np.testing.assert_array_equal(found, np.array([[False], [False], [True], [True]])
                                  & (side == -1))


# --- The loss -----------------------------------------------------------------------------------

CLEAN = np.array([1.0, 0.0])
COPIES = np.array([[0.8, 0.6], [0.6, 0.8]])


@functools.partial(jax.jit, static_argnums=5)
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
def one_row(clean, copies, mean, stored, present, of):
    return boundary.boundary_loss(clean[None], copies[None], mean[None], stored, present[None],
                                  0.25, of)[0]


def loss(points, own=None, clean=CLEAN, copies=COPIES, mean=CLEAN, of=2, room=4):
    points = np.asarray(points, np.float64).reshape(-1, 2)
    stored = np.zeros((room, 2), np.float32)
    stored[:len(points)] = points
    present = np.arange(room) < len(points)
    if own is not None:
        present[own] = False
    args = [jnp.asarray(x, jnp.float32) for x in (clean, copies, mean, stored)]
    value, gradients = one_row(*args, jnp.asarray(present), of)
    return float(value), [np.asarray(g) for g in gradients]


@pytest.mark.parametrize("points, expected", [
    ([(0, 1), (-1, 0)], 0.0), ([(0.8, 0.6)], 0.25), ([(0.96, 0.28)], 0.57), ([], 0.0),
    ([(0, 1), (0.96, 0.28), (-1, 0)], 0.57)])
def test_loss_by_hand(points, expected):
    value, gradients = loss(points)
    assert value == pytest.approx(expected, abs=1e-6)
    assert all(np.isfinite(g).all() for g in gradients)
    if not expected:
        assert not any(g.any() for g in gradients)


def test_own_copies_are_left_out_of_the_minimum():
    assert loss([(0.96, 0.28), (0.8, 0.6)], own=0)[0] == pytest.approx(0.25, abs=1e-6)
    assert loss([(0.96, 0.28)], own=0)[0] == 0


def test_means_and_boundary_carry_no_gradient_and_clip_and_copies_do():
    _, (clean, copies, mean, stored) = loss([(0.96, 0.28)], mean=np.array([0.9, 0.1]))
    assert not mean.any() and not stored.any()
    # d/dx [ |x - mu|^2 / 3 - |x - b|^2 ],  d/du |u - mu|^2 / 3
    np.testing.assert_allclose(
        clean, 2 * (CLEAN - [0.9, 0.1]) / 3 - 2 * (CLEAN - [0.96, 0.28]), atol=1e-6)
    np.testing.assert_allclose(copies, 2 * (COPIES - [0.9, 0.1]) / 3, atol=1e-6)


def test_a_random_choice_of_copies_has_the_mean_of_all():
    # Where the loss is not 0: the mean over subsets of one copy is the value of both.
    points = [(0.96, 0.28)]
    parts = [loss(points, copies=COPIES[i:i + 1])[0] for i in range(2)]
    assert np.mean(parts) == pytest.approx(loss(points)[0], abs=1e-6)
