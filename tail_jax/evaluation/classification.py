"""Class-incremental accuracy: predictions among the classes seen, and what is derived from them.

a[i][j] is the accuracy on the test clips of session j after session i >= j, among all classes seen
by then. The matrix and its summaries are those of `continual.py`; what that cannot know, the sizes
of test sets, comes in here.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np


def predict(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """int32 [n]: the class with the largest score among those seen; the first, where equal.

    Args:
        scores: [n, C].
        seen: bool [C].

    Raises:
        ValueError: if a score of a seen class is not a number, or no class has been seen.
    """
    if not seen.any():
        raise ValueError("no class has been seen; expected one or more")
    bad = np.isnan(scores[:, seen]).any(1)
    if bad.any():
        raise ValueError(f"scores are NaN in {bad.sum()} of {len(bad)} rows (first: row "
                         f"{bad.argmax()}), so nothing is predicted: did training diverge?")
    return np.where(seen, scores, -np.inf).argmax(1).astype(np.int32)


def accuracy_row(hits: Sequence[np.ndarray], sessions: int) -> list[float | None]:
    """Row of the accuracy matrix: mean of the hits (bool [n_j]) of each session; None after them.

    Raises:
        ValueError: if a session has no test clip.
    """
    empty = [number for number, own in enumerate(hits, 1) if not len(own)]
    if empty:
        raise ValueError(f"session {empty[0]} has no test clip; expected one or more")
    return [float(np.mean(own)) for own in hits] + [None] * (sessions - len(hits))


def pooled_accuracy(matrix: Sequence[Sequence[float | None]],
                    sizes: Sequence[int]) -> list[float | None]:
    """A_i = sum_{j <= i} n_j a[i][j] / sum_{j <= i} n_j for i = 1..T; None where not measured.

    Args:
        matrix: [T + 1][T], row 0 before the first session.
        sizes: n_j, test clips of each session.
    """
    result: list[float | None] = []
    for last, row in enumerate(matrix[1:], 1):
        known, counts = row[:last], sizes[:last]
        result.append(None if None in known else
                      sum(n * a for n, a in zip(counts, known)) / sum(counts))
    return result


def summarize_pooled(matrix, sizes: Sequence[int]) -> dict[str, float | None]:
    """`average`, the pooled accuracy after the last session, and `incremental_average`, the mean
    of those after each session (None, where one is missing)."""
    pooled = pooled_accuracy(matrix, sizes)
    return {"average": pooled[-1],
            "incremental_average": None if None in pooled else sum(pooled) / len(pooled)}
