"""Masks, decoder, target and errors of masked prediction, against NumPy, SciPy and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d
from scipy.special import erf
from sklearn.preprocessing import scale

from tail_jax.models.masked_patches import (PatchDecoder, frame_error, masked, targets,
                                            utterance_error, variance_over_rows, visible_patches)

pytestmark = pytest.mark.usefixtures("quick_compilation")

# --- Masks ------------------------------------------------------------------------------------


def draw(seed=0, rows=200, grid=(16, 5), count=16, block=3):
    make = jax.jit(visible_patches, static_argnums=(1, 2, 3, 4))
    return np.asarray(make(jax.random.key(seed), rows, grid, count, block))


@pytest.mark.parametrize("grid, count, block", [
    ((5, 3), 3, 2), ((16, 5), 16, 3), ((7, 2), 13, 5), ((4, 4), 1, 1), ((2, 9), 18, 3)])
def test_every_row_shows_exactly_the_number_of_distinct_patches_in_order(grid, count, block):
    shown = draw(grid=grid, count=count, block=block)
    assert shown.shape == (200, count) and shown.dtype == np.int32
    assert (np.diff(shown, axis=1) > 0).all()
    assert shown.min() >= 0 and shown.max() < grid[0] * grid[1]


def test_masks_are_fixed_by_the_key_and_differ_between_rows_and_keys():
    shown = draw()
    assert (draw() == shown).all()
    assert len(np.unique(shown, axis=0)) > 190
    assert (draw(seed=1) != shown).any(1).mean() > 0.9


def shown_neighbours(block):
    """Of the neighbours above, below, left and right of visible patches, the visible share."""
    grid = np.zeros((1000, 18, 7), bool)  # one patch of margin on each side
    frames, mels = np.divmod(draw(rows=1000, block=block), 5)
    grid[np.arange(1000)[:, None], frames + 1, mels + 1] = True
    inside = np.zeros((18, 7), bool)
    inside[1:-1, 1:-1] = True
    turned = [(1, 0), (-1, 0), (0, 1), (0, -1)]
    around = sum(np.roll(grid, turn, (1, 2)) for turn in turned)[grid].sum()
    possible = sum(np.broadcast_to(np.roll(inside, turn, (0, 1)), grid.shape)
                   for turn in turned)[grid].sum()
    return around / possible


def test_what_stays_visible_are_blocks():
    # Of 3 x 3 patches, 24 of the 36 neighbours are in the block; at random 15 of 79 would be.
    assert shown_neighbours(3) > 0.6
    assert shown_neighbours(1) == pytest.approx(15 / 79, abs=0.02)


def test_no_place_of_the_grid_is_favoured():
    # Blocks that never reached over the edge would show a corner a sixth as often as the middle.
    often = np.bincount(draw(rows=4000).ravel(), minlength=80) / 4000
    assert often.sum() == pytest.approx(16)
    assert 0.75 * 0.2 < often.min() and often.max() < 1.25 * 0.2


def test_masked_is_what_is_not_visible():
    out = np.asarray(masked(jnp.asarray([[0, 3], [1, 2]]), 5))
    assert out.tolist() == [[False, True, True, False, True], [True, False, False, True, True]]


# --- Decoder ----------------------------------------------------------------------------------

GRID, WIDTH = (5, 3), 4


def decoder(layers, channels, seed=0):
    """(module, parameters at random, tokens [2, 4, 4], visible)."""
    module = PatchDecoder(GRID, channels, layers)
    visible = jnp.asarray([[0, 4, 7, 14], [2, 3, 8, 9]])
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(2, 4, WIDTH)).astype(np.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, visible)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), params)
    return module, params, tokens, visible


def reference_decoder(params, tokens, visible):
    """One row of a decoder in float64, convolutions by SciPy."""
    x = np.tile(params["mask_token"].astype(np.float64), (GRID[0] * GRID[1], 1))
    x[visible] = tokens
    x = x.reshape(*GRID, -1)
    for i in range(sum(name.startswith("conv") for name in params)):
        conv, norm = params[f"conv_{i}"], params[f"norm_{i}"]
        y = np.stack([conv["bias"][o] + sum(
            correlate2d(x[..., c], conv["kernel"][..., c, o].astype(np.float64), "same")
            for c in range(x.shape[-1])) for o in range(conv["bias"].size)], -1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        y = y * norm["scale"] + norm["bias"]
        y = y * (1 + erf(y / np.sqrt(2))) / 2
        x = x + y if x.shape == y.shape else y
    return (x @ params["output"]["kernel"] + params["output"]["bias"]).reshape(-1, WIDTH)


@pytest.mark.parametrize("layers, channels", [(1, 4), (2, 3), (3, 5)])
def test_decoder_is_that_of_scipy(layers, channels):
    module, params, tokens, visible = decoder(layers, channels)
    out = jax.jit(module.apply)({"params": params}, tokens, visible)
    for row in range(2):
        expected = reference_decoder(params, tokens[row], np.asarray(visible[row]))
        np.testing.assert_allclose(out[row], expected, rtol=1e-4, atol=1e-4)


def test_a_visible_patch_reaches_as_far_as_there_are_convolutions():
    module, params, tokens, visible = decoder(2, 3)
    other = tokens.copy()
    other[0, 0] += 1  # the patch in the corner
    apply = jax.jit(module.apply)
    before, after = (apply({"params": params}, x, visible) for x in (tokens, other))
    moved = np.abs(np.asarray(after - before)[0]).max(-1).reshape(GRID) > 1e-6
    assert moved[:3].all() and not moved[3:].any()
    assert (after[1] == before[1]).all()


# --- Target and errors ------------------------------------------------------------------------


def test_targets_are_means_over_blocks_without_the_input_and_without_cls():
    hidden = np.random.default_rng(0).normal(2, 5, (4, 3, 1 + 7, 6)).astype(np.float32)
    hidden[0], hidden[:, :, 0] = 1e6, 1e6  # what stands before the first block, and CLS
    hidden[2] *= 30  # a loud block weighs like the others
    patches, clips = jax.jit(targets)(list(hidden))
    for row in range(3):
        blocks = hidden[1:, row, 1:].astype(float)
        expected = scale(sum(scale(block, axis=0) for block in blocks), axis=1)
        np.testing.assert_allclose(patches[row], expected, atol=1e-4)
        mean = sum(scale(block, axis=1).mean(0) for block in blocks)
        np.testing.assert_allclose(clips[row], scale(mean), atol=1e-4)


def test_what_all_patches_of_a_clip_share_is_in_the_target_of_the_clip_alone():
    rng = np.random.default_rng(1)
    common = np.zeros((1, 1, 1 + 7, 6), np.float32)
    common[:, :, 1:] = rng.normal(0, 3, 6)
    hidden = rng.normal(size=(3, 1, 1 + 7, 6)).astype(np.float32)
    (before, clip), (after, other) = (jax.jit(targets)(list(h)) for h in (hidden, hidden + common))
    np.testing.assert_allclose(after, before, atol=1e-4)
    assert np.abs(other - clip).max() > 0.5


def test_errors_worked_by_hand():
    target = jnp.asarray([[[1.0, 0.0], [3.0, 0.0], [2.0, 6.0]], [[0.0, 0.0]] * 3])
    prediction = jnp.asarray([[[9.0, 9.0], [1.0, 0.0], [2.0, 4.0]], [[5.0, 5.0]] * 3])
    hidden = jnp.asarray([[False, True, True], [True, False, False]])
    # Row 0: patches 1 and 2, (4 + 0) / 2 and (0 + 4) / 2; row 1: patch 0 alone, 25.
    np.testing.assert_allclose(frame_error(prediction, target, hidden), [2, 25])
    cls = jnp.asarray([[3.0, 0.0], [1.0, 2.0]])
    np.testing.assert_allclose(utterance_error(cls, target[:, 1]), [0, (1 + 4) / 2])


def test_variance_is_over_real_rows_alone():
    x = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
    mask = np.arange(7) < 4
    expected = x[:4].var(0).mean()
    np.testing.assert_allclose(variance_over_rows(x, mask), expected, rtol=1e-5)
    assert variance_over_rows(np.tile(x[:1], (7, 1, 1)), mask) < 1e-12
