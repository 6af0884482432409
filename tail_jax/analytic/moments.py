"""Sums over labelled features, kept when the clips are gone; order and batches do not matter.

What there is to keep:

    counts [C]        clips of each class
    sums [C, D]       sum of z over the clips of each class (for ridge: Q^T = Y^T Z)
    gram [D, D]       sum of z^T z over all clips, upper triangle (for ridge: G)
    grams [C, D, D]   sum of z^T z over the clips of each class

float64 on the host. C is the number of classes of the whole stream; those not seen yet have zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import blas

State = dict[str, np.ndarray]

SECOND_MOMENTS = ("none", "shared", "class")


def empty_moments(classes: int, width: int, second: str = "shared") -> State:
    """Sums over no clips.

    Args:
        classes: C, of the whole stream.
        width: D, of the features.
        second: "none" keeps counts and sums, "shared" also the gram (8 D^2 bytes), "class" one of
            each class (8 C D^2 bytes: 3 GB for 630 classes of width 768).

    Raises:
        ValueError: on another `second`.
    """
    if second not in SECOND_MOMENTS:
        raise ValueError(f"second moments {second!r}; expected one of {', '.join(SECOND_MOMENTS)}")
    shapes = {"none": {}, "shared": {"gram": (width, width)},
              "class": {"grams": (classes, width, width)}}[second]
    shapes = {"counts": (classes,), "sums": (classes, width)} | shapes
    return {name: np.zeros(shape) for name, shape in shapes.items()}


def accumulate(state: State, features: np.ndarray, labels: np.ndarray,
               mask: np.ndarray | None = None, *, donate: bool = False) -> State:
    """The sums with more clips, of any classes.

    Args:
        state: of `empty_moments`, or of clips before.
        features: z [n, D]; computed with in float64.
        labels: [n] numbers of classes.
        mask: [n] False on padding rows, which add nothing.
        donate: reuse the memory of `state`, which must not be read afterwards. At D = 8,192 the
            gram is 512 MiB.

    Raises:
        ValueError: if shapes do not fit, a label is no class, or a feature is not finite.
    """
    z, labels = clean_rows(features, labels, mask, *state["sums"].shape)
    state = {name: own(array, donate) for name, array in state.items()}
    present, targets = one_hot(labels)
    state["counts"][present] += targets.sum(0)
    state["sums"][present] += targets.T @ z
    if "gram" in state:
        state["gram"] = add_gram(state["gram"], z)
    if "grams" in state:
        for place, number in enumerate(present):
            rows = z[targets[:, place] > 0]
            state["grams"][number] += rows.T @ rows
    return state


def merge(*states: State) -> State:
    """The sums over the clips of all states (of several hosts, say)."""
    return {name: sum(state[name] for state in states[1:]) + states[0][name] for name in states[0]}


def class_means(state: State) -> np.ndarray:
    """mu_c [C, D]; zeros for unseen classes."""
    return state["sums"] / np.maximum(state["counts"], 1)[:, None]


def only_seen(scores, seen):
    """Scores [..., C] with -inf for classes that are not `seen` [C]; of NumPy or of JAX.

    A class without clips has zero weights, and its score of 0 can be the largest.
    """
    return (jnp if isinstance(scores, jax.Array) else np).where(seen, scores, -np.inf)


def clean_rows(features, labels, mask, classes: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(z [n, D] float64, labels [n]) of the rows that are not padding."""
    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or features.shape[1] != width or labels.shape != features.shape[:1]:
        raise ValueError(f"features {features.shape} with labels {labels.shape}; expected "
                         f"[n, {width}] with [n]")
    if mask is not None:
        kept = np.asarray(mask, bool)
        features, labels = features[kept], labels[kept]
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise ValueError(f"label {wrong[0]}; expected 0 to {classes - 1} (rows without a class are "
                         "left out by the mask)")
    broken = ~np.isfinite(features).all(axis=1)
    if broken.any():
        raise ValueError(f"features of row {broken.argmax()} are not finite; sums keep that for "
                         "good, so mend or leave out the clip")
    return np.ascontiguousarray(features, np.float64), labels


def one_hot(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the classes that occur, ascending [k]; one-hot labels over those [n, k])."""
    present, place = np.unique(labels, return_inverse=True)
    return present, np.eye(len(present))[place]


def own(array: np.ndarray, donate: bool) -> np.ndarray:
    """The array itself where it may be written to, otherwise a copy; float64, C order."""
    fits = array.dtype == np.float64 and array.flags.c_contiguous and array.flags.writeable
    return array if donate and fits else np.array(array, np.float64, order="C")


def add_gram(upper: np.ndarray, z: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """upper + scale z^T z, in place and in the upper triangle alone.

    Half the operations of a product, no second array of this size, and no rounding that could make
    the matrix unsymmetric. BLAS counts columns first, so what is upper here is lower there.
    """
    return blas.dsyrk(scale, z.T, beta=1.0, c=upper.T, lower=1, overwrite_c=1).T


def symmetric(upper: np.ndarray) -> np.ndarray:
    """The whole matrix of an upper triangle."""
    upper = np.triu(upper)
    return upper + np.triu(upper, 1).T


def parts(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `rows` rows."""
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))
