"""Which blocks and how many sessions to tune: CKA against definitions, the two rules by hand."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax.tuning import depth


def rotation(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def stream(x, y, sizes, padding=2):
    """Moments of lists of L arrays [B, S, d], batch by batch, padding rows full of rubbish."""
    total, start = None, 0
    for size in sizes:
        part = [[jnp.asarray(np.concatenate(
            [z[start:start + size], np.full((padding, *z.shape[1:]), 1e4)]), jnp.float32)
            for z in side] for side in (x, y)]
        total = depth.merge_moments(total, depth.token_moments(
            *part, jnp.arange(size + padding) < size))
        start += size
    return total


def plain_cka(x, y):
    """The definition, with Gram matrices of rows instead of columns."""
    x, y = x - x.mean(0), y - y.mean(0)
    k, l = x @ x.T, y @ y.T
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


@pytest.mark.parametrize("clips, tokens, d, sizes", [(12, 9, 16, (6, 6)), (11, 5, 7, (4, 0, 7))])
def test_streamed_cka_is_the_definition_over_all_rows(clips, tokens, d, sizes):
    random = np.random.default_rng(0)
    x = [random.normal(5, 1, (clips, tokens, d)) for _ in range(2)]
    y = [0.5 * x[0] + random.normal(size=x[0].shape), x[1] @ rotation(d) * np.arange(1, d + 1)]
    ours = depth.token_cka(stream(x, y, sizes))
    for s, a, b in zip(ours, x, y):
        assert s == pytest.approx(plain_cka(a.reshape(-1, d), b.reshape(-1, d)), abs=1e-5)
    assert 0.05 < ours[0] < 0.95


@pytest.mark.parametrize("d", [16, 9])
def test_cka_does_not_change_with_rotation_scale_and_shift(d):
    x = np.random.default_rng(1).normal(2, 1, (10, 6, d)) * np.linspace(0.1, 3, d)
    ours = depth.token_cka(stream([x], [3 * x @ rotation(d) + 1], (5, 5)))
    assert ours == pytest.approx(1, abs=1e-5)
    pooled = depth.debiased_cka(x.mean(1)[:, None], (3 * x @ rotation(d) + 1).mean(1)[:, None])
    assert pooled == pytest.approx(1, abs=1e-5)


def test_features_that_do_not_vary_are_alike_and_no_number_is_lost():
    flat = [np.ones((3, 2, 4))]
    assert depth.token_cka(stream(flat, flat, (3,))) == pytest.approx(1)
    assert depth.token_cka(stream(flat, [np.random.default_rng(0).normal(size=(3, 2, 4))],
                                  (3,))) == pytest.approx(0)


def test_layers_from_the_first_that_moved_are_tuned():
    # Layers 1 and 2 equal, 3 and 4 independent, 4,096 rows.
    random = np.random.default_rng(2)
    x = [random.normal(size=(256, 16, 24)) for _ in range(4)]
    y = [*x[:2], *(random.normal(size=(256, 16, 24)) for _ in range(2))]
    s = depth.token_cka(stream(x, y, (100, 156)))
    assert s[:2] == pytest.approx(1, abs=1e-5) and (s[2:] < 0.1).all()
    assert depth.first_below(s, 0.94) == 3


@pytest.mark.parametrize("similarities, expected", [
    ([0.99, 0.97, 0.95], 3), ([0.93, 0.99, 0.99], 1), ([0.99, 0.94, 0.9399], 3), ([0.5], 1)])
def test_first_block_below_the_threshold_or_the_last(similarities, expected):
    assert depth.first_below(similarities, 0.94) == expected


def test_plain_cka_of_few_rows_is_biased_and_the_debiased_is_not():
    # The reason for token rows: independent sets of 16 rows with 768 columns.
    random = np.random.default_rng(3)
    pairs = [random.normal(size=(2, 16, 768)) for _ in range(5)]
    assert np.mean([plain_cka(x, y) for x, y in pairs]) > 0.94
    unbiased = [depth.debiased_cka(x[:, None], y[:, None])[0] for x, y in pairs]
    assert np.abs(np.mean(unbiased)) < 0.15


def test_debiased_cka_is_made_of_the_unbiased_estimate_of_hsic():
    # Its definition: the mean over ordered quadruples of different rows (Song et al., eq. 4).
    random = np.random.default_rng(4)
    n = 7
    x, y = random.normal(size=(n, 5)), random.normal(size=(n, 3))
    y[:, 0] += x[:, 0]

    def hsic(k, l):
        terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
                 for i, j, q, r in itertools.permutations(range(n), 4)]
        return np.mean(terms)

    k, l = x @ x.T, y @ y.T
    expected = hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))
    assert depth.debiased_cka(x[:, None], y[:, None])[0] == pytest.approx(expected, rel=1e-9)


def test_debiased_cka_of_three_rows_is_an_error():
    with pytest.raises(ValueError, match="has 3 clips; debiased CKA needs 4"):
        depth.debiased_cka(np.ones((3, 1, 2)), np.ones((3, 1, 2)))


@pytest.mark.parametrize("size, sessions, expected", [
    (16, 315, 14), (24, 210, 10), (158, 8, 2), (160, 10, 2), (1398, 5, 1), (44, 7, 6), (10, 4, 4)])
def test_sessions_tune_until_more_than_220_clips_were_seen(size, sessions, expected):
    assert depth.last_tuned_session([size] * sessions, 220) == expected


def test_sessions_of_other_sizes_count_as_they_are():
    assert depth.last_tuned_session([100, 120, 1, 500], 220) == 3  # 220 is not yet more than 220
    assert [depth.still_tunes(seen, 220) for seen in (0, 100, 220, 221)] == [True] * 3 + [False]
