"""Keeping a ridge classifier up to date over a stream, against scikit-learn fitting it again.

After each session both have the weights of the ridge regression on all clips so far. Ours takes the
clips of the session alone, by recursion or by accumulation and a solve, whichever
`recursion_is_faster` says; scikit-learn's Ridge is fitted on all clips so far, which somebody has
to keep. Both get the same random features, in float64; computing them is in neither time. Sessions
alternate between the two, so that a slow minute hits both. Measured are the last session, at which
all clips have been seen, and the sum over all sessions.
"""

from __future__ import annotations

import time

import numpy as np

from tail_jax import analytic
from tail_jax.benchmarks import OURS, Comparison, Measured, Options, measured

PEER = "scikit-learn"
# Embedding width, random features, clips in all, numbers of sessions: of about 1,000 clips as in
# us8k, and of 161 as in esc50 and vocalset.
SIZES = {"full": (768, 8192, 10_000, (10, 62)), "tiny": (12, 90, 320, (3, 16))}
RELATIVE_GAMMA = 1e-2


def run(options: Options) -> Measured:
    """Seconds of the last and of all updates, for each number of sessions (`tasks`) of `items`
    clips in all.

    Raises:
        ValueError: scikit-learn is not installed, or there are more sessions than clips.
    """
    need_peer()
    width, features, clips, sessions = SIZES[options.size]
    clips, sessions = options.items or clips, options.tasks or sessions
    if sessions[-1] > clips:
        raise ValueError(f"--tasks={sessions[-1]} sessions of {clips} clips; expected a clip or "
                         "more in each")
    z = random_features(width, features, clips)
    return measured([case for number in sessions for case in _compare(z, number, options.repeats)],
                    options.repeats)


def need_peer() -> None:
    """Raises a ValueError that says what to install, where scikit-learn is missing."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise ValueError(f"this suite compares with scikit-learn, and {error.name} is not "
                         "installed; pip install 'tail_jax[test]'") from None


def random_features(width: int, features: int, clips: int) -> np.ndarray:
    """relu(z W_p) [clips, features] of normal embeddings, with a mean as after a LayerNorm."""
    random = np.random.default_rng(0)
    offset = random.standard_normal(width)
    w_p = analytic.projection(1, width, features)
    return analytic.random_features(offset + random.standard_normal((clips, width)), w_p)


def _compare(z: np.ndarray, sessions: int, repeats: int) -> list[Comparison]:
    """One stream, two classes a session, `repeats` times: its last session, and all."""
    parts = np.array_split(np.arange(len(z)), sessions)
    labels = np.concatenate([2 * t + np.arange(len(p)) % 2 for t, p in enumerate(parts)])
    recursive = analytic.recursion_is_faster([*map(len, parts)], z.shape[1], 2 * sessions)
    passes = [_pass(z, labels, parts, recursive) for _ in range(repeats)]
    difference = max(of_pass[2] for of_pass in passes)
    way = "recursion" if recursive else "accumulation"
    name = f"{len(z):,} clips in {sessions} sessions, {z.shape[1]:,} features ({way})"

    def seconds(total):
        return {side: [total(of_pass[i]) for of_pass in passes]
                for i, side in enumerate((OURS, PEER))}

    return [Comparison(f"{name}: the last", len(parts[-1]), seconds(lambda s: s[-1]), difference),
            Comparison(f"{name}: all", len(z), seconds(sum), difference)]


def _pass(z, labels, parts, recursive) -> tuple[list[float], list[float], float]:
    """(seconds of each session, ours and the peer's, largest difference of a session's scores)."""
    from sklearn.linear_model import Ridge

    gamma = RELATIVE_GAMMA * np.einsum("nm,nm->", z, z) / z.shape[1]
    targets = np.eye(labels.max() + 1)[labels]
    classes, state, ours, peer, difference = targets.shape[1], None, [], [], 0.0
    for part in parts:
        here, so_far = slice(part[0], part[-1] + 1), slice(0, part[-1] + 1)
        start = time.perf_counter()
        if recursive:
            state = state or analytic.start_recursion(classes, z.shape[1], gamma)
            state = analytic.recurse(state, z[here], labels[here], donate=True)
            weights = state["weights"]
        else:
            state = state or analytic.empty_moments(classes, z.shape[1])
            state = analytic.accumulate(state, z[here], labels[here], donate=True)
            weights = analytic.solve_ridge(state, gamma)
        middle = time.perf_counter()
        model = Ridge(alpha=gamma, fit_intercept=False, copy_X=False)
        model.fit(z[so_far], targets[so_far])
        ours.append(middle - start)
        peer.append(time.perf_counter() - middle)
        difference = max(difference, np.abs(z[here] @ (weights - model.coef_.T)).max())
    return ours, peer, float(difference)
