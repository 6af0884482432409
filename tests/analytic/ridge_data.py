"""A stream of random features in ten unequal sessions, for the tests of ridge regression."""

import numpy as np

from tail_jax.analytic import projection, random_features

SIZES = (31, 117, 16, 64, 1, 250, 33, 90, 7, 205)
CLASSES, WIDTH, FEATURES = 29, 37, 512
UNSEEN = (5, 21, 28)


def embeddings(random, labels):
    """Rows about their class means, with a large mean direction, as after a LayerNorm."""
    centres = np.random.default_rng(9).normal(size=(CLASSES, WIDTH))
    return (1 + centres[labels] + 0.7 * random.normal(size=(len(labels), WIDTH))).astype(np.float32)


def sessions():
    """[(features [n, M] float64, labels [n])] of ten sessions; most classes come back in others."""
    random = np.random.default_rng(3)
    seen = np.setdiff1d(np.arange(CLASSES), UNSEEN)
    new, w_p, out = np.array_split(seen, len(SIZES)), projection(4, WIDTH, FEATURES), []
    for number, size in enumerate(SIZES):
        known = np.concatenate(new[:number + 1])
        again = random.choice(known, size)
        labels = np.where(random.random(size) < 0.7, random.choice(new[number], size), again)
        labels[:len(new[number])] = new[number][:size]
        out.append((random_features(embeddings(random, labels), w_p), labels))
    return out


def gamma_of(features, relative):
    """gamma at a relative strength gamma M / tr Z^T Z."""
    return relative * (features**2).sum() / features.shape[1]


def padded(features, labels, rows, random):
    """(features, labels, mask) of `rows` rows in random places, the others rubbish."""
    place = np.sort(random.permutation(rows)[:len(labels)])
    mask = np.zeros(rows, bool)
    mask[place] = True
    out, numbers = random.normal(size=(rows, features.shape[1])) * 99, random.integers(0, 3, rows)
    out[place], numbers[place] = features, labels
    return out, numbers, mask
