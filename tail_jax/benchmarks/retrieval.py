"""Ranking captions against clips, against numpy's argsort of all scores; time, and peak memory.

The peer multiplies blocks of queries with the gallery in float32 by BLAS, sorts each row of the
scores by argsort, and takes the metrics from where the caption's clip stands, behind equals. Both
rank the same embeddings, whose components are multiples of 2^-11: every product of two is one of
2^-22, every sum of such below 4 is exact in float32 in any order, and the metrics must be equal.
Memory is the largest resident set of a process that does nothing else, imports and embeddings
included.
"""

from __future__ import annotations

import numpy as np

from tail_jax.benchmarks import OURS, Comparison, Measured, Options, compare, measured
from tail_jax.process import run_python

PEER = "numpy argsort"
# Captions, clips, dimensions.
SIZES = {"full": (100_000, 20_000, 512), "tiny": (300, 130, 16)}
METRICS = ("R@1", "R@5", "R@10", "mAP@10", "MedR")
# Length of what a caption adds to its clip's embedding: few captions find their clip at once.
_NOISE = 6.0
_PEER_BLOCK = 512
_MEASURE = """
import sys
from tail_jax import process
from tail_jax.benchmarks import retrieval
who, *sizes = sys.argv[1:]
data = retrieval.embeddings(*map(int, sizes))
retrieval.SIDES[who](*data)
print(process.peak_bytes() / 1e6)
"""


def run(options: Options) -> Measured:
    """Seconds and MB of ranking; `items` is the number of captions.

    The long case is measured a quarter as often: its peer takes minutes.
    """
    captions, clips, width = SIZES[options.size]
    captions = options.items or captions
    case = f"{captions:,} captions on {clips:,} clips, {width} dimensions"
    repeats = max(1, options.repeats // 4)
    memory = {who: [float(run_python(_MEASURE, who, str(captions), str(clips), str(width)))
                    for _ in range(repeats)] for who in SIDES}
    data = embeddings(captions, clips, width)
    seconds = compare(case, captions, repeats,
                      {who: lambda rank=rank: rank(*data) for who, rank in SIDES.items()})
    return measured([seconds, Comparison(f"peak memory of {case}", captions, memory,
                                         seconds.difference, "MB")], repeats)


def embeddings(captions: int, clips: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Captions [captions, width], the clip of each [captions], clips [clips, width]; about unit."""
    random = np.random.default_rng(0)
    gallery = _unit(random.standard_normal((clips, width), np.float32))
    owner = (np.arange(captions) % clips).astype(np.int32)
    queries = np.empty((captions, width), np.float32)
    for rows in _blocks(captions):
        noise = _unit(random.standard_normal((len(owner[rows]), width), np.float32))
        queries[rows] = _unit(gallery[owner[rows]] + _NOISE * noise)
    for array in (queries, gallery):
        np.rint(array * 2**11, out=array)
        array /= 2**11
    return queries, owner, gallery


def ours(queries, owner, gallery) -> np.ndarray:
    """The metrics, in the order of `METRICS`."""
    from tail_jax.evaluation.retrieval import retrieval_metrics
    clip = np.arange(len(gallery), dtype=np.int32)[:, None]
    found = retrieval_metrics(queries, owner[:, None], gallery, clip)
    return np.array([found[name] for name in METRICS])


def numpys(queries, owner, gallery) -> np.ndarray:
    """The same, from the places at which argsort puts the caption's clip."""
    ranks = []
    for rows in _blocks(len(queries)):
        scores = queries[rows] @ gallery.T
        order = np.argsort(-scores, axis=1)
        place = (order == owner[rows, None]).argmax(axis=1)
        query = np.arange(len(place))
        own = scores[query, owner[rows]]
        while True:  # ties are few
            behind = np.minimum(place + 1, len(gallery) - 1)
            tied = (behind > place) & (scores[query, order[query, behind]] == own)
            if not tied.any():
                break
            place = np.where(tied, behind, place)
        ranks.append(place + 1)
    rank = np.concatenate(ranks)
    precision = np.where(rank <= 10, 1.0 / rank, 0.0)
    return np.array([*(np.mean(rank <= k) for k in (1, 5, 10)), precision.mean(), np.median(rank)])


SIDES = {OURS: ours, PEER: numpys}


def _blocks(rows: int) -> list[slice]:
    return [slice(first, first + _PEER_BLOCK) for first in range(0, rows, _PEER_BLOCK)]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
