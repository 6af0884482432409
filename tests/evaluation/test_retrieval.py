"""The metrics against double loops and explicit sorts, on data full of ties.

Hand-worked case used below. One query q = (1, 0), five items with scores 0.9, 0.7, 0.7, 0.7, 0.1;
relevant are the second (0.7) and the last (0.1). The best relevant item scores 0.7; three
irrelevant ones score at least that (0.9, 0.7, 0.7), so r = 4. In pessimistic order the relevant
items stand at 4 and 5: AP@10 = (1/4 + 2/5) / 2 = 0.325.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from tail_jax.evaluation import retrieval


def brute_force(queries, query_keys, gallery, gallery_keys):
    """Rank by a double loop, AP@10 by sorting the gallery: score descending, relevant last."""
    ranks, precisions, ties = [], [], []
    for query, wanted in zip(np.asarray(queries, np.float32), query_keys):
        wanted = {key for key in wanted.tolist() if key >= 0}
        items = []
        for item, keys in zip(np.asarray(gallery, np.float32), gallery_keys):
            score = float(np.sum(query.astype(np.float64) * item.astype(np.float64)))
            items.append((score, bool(wanted & set(keys.tolist()))))
        best = max(score for score, relevant in items if relevant)
        ranks.append(1 + sum(score >= best for score, relevant in items if not relevant))
        ties.append(any(score == best for score, relevant in items if not relevant))
        found, total = 0, 0.0
        for position, (_, relevant) in enumerate(
            sorted(items, key=lambda x: (-x[0], x[1])), start=1
        ):
            if relevant and position <= 10:
                found += 1
                total += found / position
        precisions.append(total / min(sum(relevant for _, relevant in items), 10))
    ranks = np.array(ranks)
    middle = sorted(ranks)[(len(ranks) - 1) // 2 : len(ranks) // 2 + 1]
    return {
        "R@1": (ranks <= 1).mean(),
        "R@5": (ranks <= 5).mean(),
        "R@10": (ranks <= 10).mean(),
        "mAP@10": np.mean(precisions),
        "MedR": sum(middle) / len(middle),
        "ties": np.mean(ties),
    }


def grid(rng, size, dimensions, levels=3):
    """Small integers: scores are exact in any order of summation, and many are equal."""
    return rng.integers(-levels, levels + 1, (size, dimensions)).astype(np.float32)


def padded_keys(rng, size, width, names):
    """Between one and `width` keys a row, padding anywhere."""
    keys = rng.integers(0, names, (size, width))
    keys[rng.random((size, width)) < 0.4] = -1
    empty = (keys < 0).all(axis=1)
    keys[empty, rng.integers(width)] = rng.integers(0, names, empty.sum())
    return keys.astype(np.int32)


def make_every_query_answerable(query_keys, gallery_keys, names):
    gallery_keys[:names, 0] = np.arange(names)
    return query_keys, gallery_keys


@pytest.mark.parametrize(
    "num_queries, num_items, query_width, gallery_width, dimensions, names",
    [
        (1, 1, 1, 1, 1, 1),
        (7, 3, 1, 2, 2, 3),
        (37, 61, 1, 5, 3, 23),
        (41, 301, 4, 1, 2, 97),
        (19, 300, 3, 3, 5, 11),  # more than ten relevant items each
        (13, 257, 2, 2, 1, 257),
    ],
)
@pytest.mark.parametrize("block", [5, 1024])
def test_metrics_equal_brute_force_under_many_ties(
    num_queries, num_items, query_width, gallery_width, dimensions, names, block
):
    rng = np.random.default_rng(num_queries)
    queries, gallery = grid(rng, num_queries, dimensions), grid(rng, num_items, dimensions)
    query_keys, gallery_keys = make_every_query_answerable(
        padded_keys(rng, num_queries, query_width, names),
        padded_keys(rng, num_items, gallery_width, names),
        names,
    )
    expected = brute_force(queries, query_keys, gallery, gallery_keys)
    found = retrieval.retrieval_metrics(queries, query_keys, gallery, gallery_keys, block=block)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name


def test_hand_worked_query():
    scores = np.array([0.9, 0.7, 0.7, 0.7, 0.1], np.float32)
    found = retrieval.retrieval_metrics(
        np.array([[1.0, 0.0]]),
        np.array([[8, -1]]),
        np.stack([scores, np.zeros(5)], axis=1),
        np.array([[1, -1], [8, 2], [3, 4], [-1, -1], [5, 8]]),
    )
    assert found == {
        "R@1": 0,
        "R@5": 1,
        "R@10": 1,
        "mAP@10": pytest.approx(0.325),
        "MedR": 4,
        "ties": 1,
    }


def test_average_precision_equals_scikit_learn_where_nothing_ties_and_ten_items_are_all():
    rng = np.random.default_rng(4)
    queries, gallery = rng.normal(size=(17, 6)), rng.normal(size=(10, 6))
    keys = np.concatenate([[0, 1], rng.integers(0, 2, 8)])[:, None]
    query_keys = rng.integers(0, 2, (17, 1))
    expected = [
        average_precision_score(keys[:, 0] == key, gallery @ query)
        for query, key in zip(queries, query_keys[:, 0])
    ]
    found = retrieval.retrieval_metrics(queries, query_keys, gallery, keys)
    assert found["mAP@10"] == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("num_items", [11, 255, 257, 700])
def test_collapsed_embeddings_earn_nothing(num_items):
    """All scores equal: r is the number of items, wherever the relevant one stands."""
    same = np.random.default_rng(0).normal(size=(1, 77)).astype(np.float32)
    gallery = np.repeat(same, num_items, axis=0)
    keys = np.arange(num_items)[:, None]
    found = retrieval.retrieval_metrics(gallery, keys, gallery, keys, block=64)
    assert found == {"R@1": 0, "R@5": 0, "R@10": 0, "mAP@10": 0, "MedR": num_items, "ties": 1}


def test_order_of_the_gallery_does_not_matter():
    rng = np.random.default_rng(1)
    queries, gallery = grid(rng, 23, 2), grid(rng, 45, 2)
    query_keys, gallery_keys = rng.integers(0, 9, (23, 1)), np.arange(45)[:, None] % 9
    order = rng.permutation(45)
    found = retrieval.retrieval_metrics(queries, query_keys, gallery, gallery_keys)
    assert found == retrieval.retrieval_metrics(
        queries, query_keys, gallery[order], gallery_keys[order]
    )


def test_bfloat16_embeddings_are_cast_before_the_product():
    """1 + 2^-8 and 1 differ as float32 scores, and would be equal as bfloat16 ones."""
    queries = jnp.array([[1.0, 2.0**-8]], jnp.bfloat16)
    gallery = jnp.array([[1.0, 1.0], [1.0, 0.0]], jnp.bfloat16)
    found = retrieval.retrieval_metrics(queries, np.array([[0]]), gallery, np.array([[0], [1]]))
    assert (found["R@1"], found["ties"]) == (1, 0)


def test_median_of_an_even_number_of_queries_averages_the_middle_pair():
    """Ranks 1 and 2 over three items."""
    gallery = np.array([[3.0], [2.0], [1.0]])
    found = retrieval.retrieval_metrics(
        np.ones((2, 1)), np.array([[0], [1]]), gallery, np.arange(3)[:, None]
    )
    assert found["MedR"] == 1.5


def test_padding_keys_never_match():
    queries = gallery = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"1 of 3 queries have no relevant item .*query 1"):
        retrieval.retrieval_metrics(
            queries, np.array([[0], [-1], [2]]), gallery, np.array([[0], [-1], [2]])
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_values_that_are_not_finite_are_refused(value, side):
    arrays = [np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)]
    arrays[side][2, 1] = value
    keys = np.arange(4)[:, None]
    with pytest.raises(
        ValueError, match=r"(queries|gallery) embeddings hold NaN or Inf in 1 of 4 .*row 2"
    ):
        retrieval.retrieval_metrics(arrays[0], keys, arrays[1], keys)


def test_overflowing_scores_are_refused():
    keys = np.arange(2)[:, None]
    huge = np.array([[1e30, 1e30], [1.0, 1.0]])
    with pytest.raises(ValueError, match="query 0 overflow"):
        retrieval.retrieval_metrics(huge, keys, huge, keys)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (np.ones((2, 3)), np.ones((2, 1)), np.ones((2, 4)), np.ones((2, 1))),
            "3 dimensions .* has 4",
        ),
        (
            (np.ones((2, 3)), np.ones(2), np.ones((2, 3)), np.ones((2, 1))),
            r"keys of the queries .*\[2, keys\]",
        ),
        (
            (np.ones((2, 3)), np.ones((2, 1)), np.ones((0, 3)), np.ones((0, 1))),
            "gallery have shape",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval.retrieval_metrics(*arguments)


def test_galleries_of_many_sizes_share_a_compiled_program():
    rng = np.random.default_rng(2)
    retrieval._rank_block.clear_cache()
    for size in range(3, 250, 19):
        embeddings, keys = rng.normal(size=(size, 5)), np.arange(size)[:, None]
        retrieval.retrieval_metrics(embeddings, keys, embeddings, keys)
    assert retrieval._rank_block._cache_size() == 1


def test_caption_keys_are_shared_by_tasks_and_padded():
    """Clip 1 of task 0 owns `b` twice: one key. `a` stands in both tasks: one key."""
    (first, first_clips), (second, second_clips) = retrieval.caption_keys(
        [["a", "b", "b", "c"], ["d", "a"]], [np.array([0, 1, 1, 1]), np.array([1, 0])], [2, 2]
    )
    assert first.tolist() == [0, 1, 1, 2] and second.tolist() == [3, 0]
    assert first_clips.tolist() == [[0, -1], [1, 2]] and second_clips.tolist() == [[0, -1], [3, -1]]
    assert {array.dtype for array in (first, first_clips, second_clips)} == {np.dtype(np.int32)}


def test_caption_keys_refuse_clips_that_do_not_exist():
    with pytest.raises(ValueError, match=r"task 0: .* expected one clip row in 0..1"):
        retrieval.caption_keys([["a", "b"]], [np.array([0, 2])], [2])
