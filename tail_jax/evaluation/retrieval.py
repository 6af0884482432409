"""Text-audio retrieval metrics over pools of tasks.

`retrieval_metrics` scores one set of queries on one gallery; `evaluate_row` does so for every
task, pool and index of a text-audio stream. Both are deterministic and embed nothing themselves.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

DIRECTIONS = ("text_to_audio", "audio_to_text")
METRICS = ("R@1", "R@5", "R@10", "mAP@10", "MedR")
STRICT_METRICS = ("R@1", "R@5", "R@10")

_CUTOFF = 10  # of mAP@10
# Galleries are padded to powers of two, large ones to an eighth of one, so that pools of many sizes
# share a few compiled programs, and so that no column of the scores goes through the remainder path
# of a matrix product: equal items must get equal bits, or a tie would be decided by their place in
# the gallery.
_SMALLEST_GALLERY = 256
_LARGE_GALLERY = 4096
# Scores on the device at once: 64 MiB or 256 MiB.
_MAX_SCORES = {"cpu": 2**24}
_MAX_SCORES_ELSEWHERE = 2**26
# What is counted of scores is counted in one pass, as digits of one number for so many of them;
# divides the size of every padded gallery.
_COUNTED, _DIGIT_BITS = 256, 10


@jax.jit
def _rank_block(queries, relevant, gallery, num_items):
    """Rank, AP@10, tie and finiteness of every query of one block.

    queries [B, d]; relevant [B, R], the rows of the gallery that are, -1 elsewhere; gallery [G, d],
    rows from num_items on are padding.
    """
    scores = jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)  # [B, G]
    is_item = jnp.arange(gallery.shape[0]) < num_items
    relevant_scores = jnp.where(
        relevant >= 0, jnp.take_along_axis(scores, relevant, axis=1, mode="clip"), -jnp.inf
    )
    num_relevant = (relevant >= 0).sum(axis=1)

    # The i-th best relevant item stands behind i - 1 relevant items and every irrelevant one that
    # scores at least as much: all such items but the relevant ones. No score needs to be sorted.
    top = jax.lax.top_k(relevant_scores, min(_CUTOFF, relevant.shape[1]))[0]  # [B, 10]
    best = top[:, :1]
    digits = (scores >= best, scores == best, ~jnp.isfinite(scores))
    at_least, equal, broken = _count([digit & is_item for digit in digits])
    ahead = [at_least - (relevant_scores >= best).sum(axis=1)]
    for i in range(1, top.shape[1]):
        score = top[:, i : i + 1]
        (at_least,) = _count([(scores >= score) & is_item])
        ahead.append(at_least - (relevant_scores >= score).sum(axis=1))
    ahead = jnp.stack(ahead, axis=1)
    tied = equal > (relevant_scores == best).sum(axis=1)
    order = jnp.arange(1, top.shape[1] + 1)
    counted = (order <= num_relevant[:, None]) & (order + ahead <= _CUTOFF)
    precision = jnp.where(counted, order / (order + ahead), 0.0)
    average_precision = precision.sum(axis=1) / jnp.clip(num_relevant, 1, _CUTOFF)
    return 1 + ahead[:, 0], average_precision, tied, broken == 0


def _count(flags):
    """How many are True in each row of each of up to three arrays [B, G] of bool; int32 [B] each.

    One pass over what they are computed from, where a sum of each would be one each.
    """
    number = sum(flag.astype(jnp.int32) << (_DIGIT_BITS * i) for i, flag in enumerate(flags))
    number = number.reshape(len(number), -1, _COUNTED).sum(axis=2)
    digit = (1 << _DIGIT_BITS) - 1
    return [((number >> (_DIGIT_BITS * i)) & digit).sum(axis=1) for i in range(len(flags))]


class _Relevance:
    """Which items are relevant to which queries, from their keys, a block of queries at a time.

    Attributes:
      width: at least as many as any query has relevant items, a power of two.
    """

    def __init__(self, query_keys: np.ndarray, gallery_keys: np.ndarray):
        keys, items = gallery_keys.ravel(), np.repeat(
            np.arange(len(gallery_keys), dtype=np.int32), gallery_keys.shape[1]
        )
        keys, items = keys[keys >= 0], items[keys >= 0]
        order = np.argsort(keys, kind="stable")
        keys, self._items = keys[order], items[order]
        self._first = np.searchsorted(keys, query_keys)  # [Q, Kq]
        self._number = np.searchsorted(keys, query_keys, side="right") - self._first
        self._number[query_keys < 0] = 0
        most = self._number.sum(axis=1).max(initial=0)
        self.width = 1 << int(max(min(most, len(gallery_keys)), 1) - 1).bit_length()

    def of(self, rows: slice, size: int) -> np.ndarray:
        """Relevant items [size, width] of queries, each once, -1 after them and in missing rows."""
        first, number = self._first[rows].ravel(), self._number[rows].ravel()
        query = np.repeat(np.arange(len(number)) // self._first.shape[1], number)
        place = np.arange(len(query)) - np.repeat(np.cumsum(number) - number, number)
        items = self._items[np.repeat(first, number) + place]
        # An item that shares two keys with a query, or has one of them twice, counts once.
        order = np.lexsort((items, query))
        query, items = query[order], items[order]
        new = np.ones(len(query), bool)
        new[1:] = (query[1:] != query[:-1]) | (items[1:] != items[:-1])
        query, items = query[new], items[new]
        out = np.full((size, self.width), -1, np.int32)
        out[query, np.arange(len(query)) - np.searchsorted(query, query)] = items
        return out


def retrieval_metrics(
    queries, query_keys, gallery, gallery_keys, *, block: int = 1024
) -> dict[str, float]:
    """Retrieval metrics of queries [Q, d] against a gallery [G, d].

    Item g is relevant to query q iff the two share a key: query_keys [Q, Kq] and gallery_keys [G,
    Kg] are int32, padded with -1, which matches nothing. With s(q, g) the inner product in float32
    and R(q) the relevant items,

        r(q) = 1 + #{g not in R(q): s(q, g) >= max_{h in R(q)} s(q, h)}
        AP@10(q) = 1 / min(|R|, 10) * sum_{k <= 10} 1[g_(k) in R] * precision at k,

    irrelevant items first among equal scores: ties are pessimistic, so collapsed embeddings earn
    nothing.

    Args:
      queries, gallery: embeddings of any float type; cast to float32 before the product.
      query_keys, gallery_keys: the keys above.
      block: queries scored at once, at most (fewer if the gallery is large).

    Returns:
      "R@1", "R@5", "R@10": fraction of queries with r <= k; "mAP@10": mean AP@10; "MedR": median of
      r, the middle pair averaged; "ties": fraction of queries whose best relevant item ties with an
      irrelevant one.

    Raises:
      ValueError: on shapes that do not fit, on NaN or Inf, on a query without any relevant item.
    """
    queries, query_keys = _checked("queries", queries, query_keys)
    gallery, gallery_keys = _checked("gallery", gallery, gallery_keys)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions and the gallery has {gallery.shape[1]}; "
            "embed both with the same model"
        )
    if block < 1:
        raise ValueError(f"block is {block}; expected a positive number of queries")

    relevance = _Relevance(query_keys, gallery_keys)
    padded_size = _padded_size(len(gallery))
    most = _MAX_SCORES.get(jax.default_backend(), _MAX_SCORES_ELSEWHERE)
    block = max(1, min(block, most // (padded_size + relevance.width)))
    num_items = np.int32(len(gallery))
    gallery = jnp.asarray(_pad_rows(gallery, padded_size, 0.0))
    blocks = []
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        relevant = relevance.of(rows, block)
        outputs = _rank_block(_pad_rows(queries[rows], block, 0.0), relevant, gallery, num_items)
        outputs = (*outputs, (relevant >= 0).sum(axis=1))
        blocks.append([np.asarray(output)[: len(queries[rows])] for output in outputs])
    rank, average_precision, tied, finite, num_relevant = map(np.concatenate, zip(*blocks))

    if not finite.all():
        raise ValueError(
            f"scores of query {np.argmin(finite)} overflow float32; normalise the embeddings first"
        )
    if (num_relevant == 0).any():
        raise ValueError(
            f"{(num_relevant == 0).sum()} of {len(queries)} queries have no relevant item in the "
            f"gallery (first: query {np.argmin(num_relevant)}); look at the keys"
        )
    return {
        **{f"R@{k}": float(np.mean(rank <= k)) for k in (1, 5, 10)},
        "mAP@10": float(np.mean(average_precision, dtype=np.float64)),
        "MedR": float(np.median(rank)),
        "ties": float(np.mean(tied)),
    }


def caption_keys(
    captions: Sequence[Sequence[str]], caption_clip: Sequence[np.ndarray], num_clips: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Integer names for captions, shared by all tasks.

    Args:
      captions: per task, the normalised captions; equal strings get equal keys, in whatever tasks
        they stand.
      caption_clip: per task, int [N]: the clip each caption belongs to.
      num_clips: per task, the number of clips C.

    Returns:
      Per task: the key of each caption, int32 [N], and the keys of each clip, int32 [C, K], every
      key once, padded with -1. K, the most keys any clip has, is the same for all tasks.

    Raises:
      ValueError: if captions and caption_clip differ in length or name a clip that does not exist.
    """
    numbers: dict[str, int] = {}
    per_caption, per_clip = [], []
    for task, (texts, owners, size) in enumerate(
        zip(captions, caption_clip, num_clips, strict=True)
    ):
        owners = np.asarray(owners)
        if owners.shape != (len(texts),) or (
            len(texts) and not 0 <= owners.min() <= owners.max() < size
        ):
            raise ValueError(
                f"task {task}: caption_clip of shape {owners.shape} for {len(texts)} captions of "
                f"{size} clips; expected one clip row in 0..{size - 1} for each caption"
            )
        keys = np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int32)
        owned: list[dict[int, None]] = [
            {} for _ in range(size)
        ]  # a dict keeps the order of arrival
        for owner, key in zip(owners.tolist(), keys.tolist()):
            owned[owner][key] = None
        per_caption.append(keys)
        per_clip.append([list(keys) for keys in owned])
    width = max((len(keys) for clips in per_clip for keys in clips), default=0)
    padded = [
        np.array([keys + [-1] * (width - len(keys)) for keys in clips], np.int32).reshape(
            len(clips), width
        )
        for clips in per_clip
    ]
    return list(zip(per_caption, padded))


@dataclasses.dataclass(frozen=True)
class TaskEmbeddings:
    """The test set of one task, embedded by one model."""

    audio: np.ndarray  # [clips, d], L2-normalised
    text: np.ndarray  # [captions, d], L2-normalised
    caption_clip: np.ndarray  # [captions] int, row of `audio` that each caption describes
    captions: Sequence[str]  # [captions], normalised


def evaluate_row(
    fresh: Sequence[TaskEmbeddings],
    stale: Sequence[tuple[np.ndarray, np.ndarray] | None],
    task_index: int,
    *,
    block: int = 1024,
) -> dict[str, list[float | None]]:
    """One row of every result matrix: all metrics on all tasks after training on task_index tasks.

    Pools: `own` searches the task's own test set; `seen` those of the first task_index tasks, for
    their queries only; `all` those of all tasks. Indices: `fresh` galleries are embedded by the
    present model, `stale` ones as the model that had just finished their task did; the queries are
    fresh in both. Relevance goes over the whole pool by equal captions, except for `strict_R@k`,
    which knows annotated pairs only.

    Args:
      fresh: per task, its test set embedded by the present model; all tasks, the future ones too.
      stale: per task, (audio [clips, d], text [captions, d]) as embedded at the end of that task;
        None where there is none (tasks to come; joint training).
      task_index: m, how many tasks have been trained on; 0 is the model before the first.
      block: queries scored at once.

    Returns:
      For every key direction/metric/pool/index a list with a value for each task, None where not
      defined: METRICS on own/fresh, seen/fresh, all/fresh, own/stale, seen/stale; strict_R@1,
      strict_R@5, strict_R@10 and ties on own/fresh. Rates are fractions.

    Raises:
      ValueError: on embeddings that are not finite or do not fit, and on a clip without captions.
    """
    num_tasks = len(fresh)
    if len(stale) != num_tasks:
        raise ValueError(
            f"{len(stale)} stale galleries for {num_tasks} tasks; pass one (or None) for each task"
        )
    if not 0 <= task_index <= num_tasks:
        raise ValueError(
            f"task_index is {task_index}; expected 0 (before the first task) to {num_tasks}"
        )
    _check_tasks(fresh, stale)

    keys = caption_keys(
        [task.captions for task in fresh],
        [task.caption_clip for task in fresh],
        [len(task.audio) for task in fresh],
    )
    caption_key = [by_caption[:, None] for by_caption, _ in keys]  # [captions, 1]
    clip_keys = [by_clip for _, by_clip in keys]  # [clips, K]
    audio, text = [task.audio for task in fresh], [task.text for task in fresh]
    # direction -> fresh queries, their keys, fresh gallery, stale gallery, gallery keys; one entry
    # a task
    sides = {
        "text_to_audio": (
            text,
            caption_key,
            audio,
            [pair and pair[0] for pair in stale],
            clip_keys,
        ),
        "audio_to_text": (
            audio,
            clip_keys,
            text,
            [pair and pair[1] for pair in stale],
            caption_key,
        ),
    }
    seen = tuple(range(task_index))
    row: dict[str, list[float | None]] = {}

    for direction, (
        queries,
        query_keys,
        fresh_gallery,
        stale_gallery,
        gallery_keys,
    ) in sides.items():
        known: dict[tuple, dict[str, float]] = (
            {}
        )  # the pools coincide in the first and the last row
        for index, gallery in (("fresh", fresh_gallery), ("stale", stale_gallery)):
            for pool in ("own", "seen", "all") if index == "fresh" else ("own", "seen"):
                values: list[dict[str, float] | None] = []
                for task in range(num_tasks):
                    members = {"own": (task,), "seen": seen, "all": tuple(range(num_tasks))}[pool]
                    asked = task in seen or (index == "fresh" and pool != "seen")
                    if not asked or any(gallery[member] is None for member in members):
                        values.append(None)
                        continue
                    if (index, task, members) not in known:
                        known[index, task, members] = retrieval_metrics(
                            queries[task],
                            query_keys[task],
                            np.concatenate([gallery[member] for member in members]),
                            np.concatenate([gallery_keys[member] for member in members]),
                            block=block,
                        )
                    values.append(known[index, task, members])
                logged = METRICS + ("ties",) if (pool, index) == ("own", "fresh") else METRICS
                for metric in logged:
                    row[f"{direction}/{metric}/{pool}/{index}"] = [
                        value and value[metric] for value in values
                    ]

        pairs = [_strict_keys(task) for task in fresh]
        strict = [
            retrieval_metrics(queries[j], own, fresh_gallery[j], other, block=block)
            for j, (own, other) in enumerate(
                pairs if direction == "text_to_audio" else [pair[::-1] for pair in pairs]
            )
        ]
        for metric in STRICT_METRICS:
            row[f"{direction}/strict_{metric}/own/fresh"] = [value[metric] for value in strict]
    return row


def _strict_keys(task: TaskEmbeddings) -> tuple[np.ndarray, np.ndarray]:
    """Keys [captions, 1] and [clips, 1]: a caption belongs to the clip it was written for alone."""
    caption_clip = np.asarray(task.caption_clip, np.int32)
    return caption_clip[:, None], np.arange(len(task.audio), dtype=np.int32)[:, None]


def _check_tasks(fresh, stale) -> None:
    for number, (task, old) in enumerate(zip(fresh, stale), start=1):
        arrays = {"audio": task.audio, "text": task.text}
        if old is not None:
            arrays |= {"stale audio": old[0], "stale text": old[1]}
        for name, array in arrays.items():
            _check_finite(f"task {number}: {name}", np.asarray(array))
            expected = np.shape(arrays[name.removeprefix("stale ")])
            if np.shape(array) != expected:
                raise ValueError(
                    f"task {number}: {name} embeddings have shape {np.shape(array)}, the fresh "
                    f"ones {expected}; the stale gallery belongs to another test set or model"
                )
        if len(task.captions) != len(task.text):
            raise ValueError(
                f"task {number}: {len(task.captions)} captions for {len(task.text)} text "
                "embeddings; expected one each"
            )


def _checked(name: str, embeddings, keys) -> tuple[np.ndarray, np.ndarray]:
    embeddings, keys = np.asarray(embeddings), np.asarray(keys)
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(
            f"{name} have shape {embeddings.shape}; expected [items, dimensions], at least one item"
        )
    if keys.ndim != 2 or len(keys) != len(embeddings):
        raise ValueError(
            f"keys of the {name} have shape {keys.shape}; expected [{len(embeddings)}, keys], "
            "padded with -1"
        )
    _check_finite(name, embeddings)
    return embeddings.astype(np.float32, copy=False), keys.astype(np.int32, copy=False)


def _check_finite(name: str, embeddings: np.ndarray) -> None:
    bad = ~np.isfinite(embeddings.astype(np.float32, copy=False)).all(axis=-1)
    if bad.any():
        raise ValueError(
            f"{name} embeddings hold NaN or Inf in {bad.sum()} of {len(bad)} rows (first: row "
            f"{np.argmax(bad)}); NaN would compare to rank 1, so nothing is scored: did training "
            "diverge?"
        )


def _pad_rows(array: np.ndarray, size: int, value) -> np.ndarray:
    return np.pad(array, ((0, size - len(array)), (0, 0)), constant_values=value)


def _padded_size(items: int) -> int:
    power = 1 << (items - 1).bit_length()
    step = power // 8 if power > _LARGE_GALLERY else power
    return max(_SMALLEST_GALLERY, -(-items // step) * step)
