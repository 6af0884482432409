"""Rows of the result matrices against plain loops over tasks, pools and indices."""

import numpy as np
import pytest

from tail_jax.evaluation import retrieval

WORDS = ["rain", "a dog barks", "wind", "steps", "a bell", "birds", "an engine", "waves", "a door"]
CLIPS = (5, 9, 4)


def make_task(rng, clips):
    """One to four captions a clip, some shared by clips and tasks; the embeddings tie a lot."""
    caption_clip = np.repeat(np.arange(clips), rng.integers(1, 5, clips))
    captions = [
        str(rng.choice(WORDS)) + ("" if rng.random() < 0.4 else f" {rng.integers(30)}")
        for _ in caption_clip
    ]
    return retrieval.TaskEmbeddings(
        audio=rng.integers(-2, 3, (clips, 3)).astype(np.float32),
        text=rng.integers(-2, 3, (len(captions), 3)).astype(np.float32),
        caption_clip=caption_clip,
        captions=captions,
    )


def make_stale(rng, tasks, task_index):
    return [
        (
            tuple(
                rng.integers(-2, 3, array.shape).astype(np.float32)
                for array in (task.audio, task.text)
            )
            if number < task_index
            else None
        )
        for number, task in enumerate(tasks)
    ]


def expected_value(direction, metric, tasks, galleries, task, members):
    """Relevance by comparing strings, ranks and AP by lists; galleries[j] is (audio, text)."""
    owned = [
        [
            {c for c, k in zip(t.captions, t.caption_clip) if k == clip}
            for clip in range(len(t.audio))
        ]
        for t in tasks
    ]
    named = [[{caption} for caption in t.captions] for t in tasks]
    if direction == "text_to_audio":
        queries, query_names, side, item_names = tasks[task].text, named[task], 0, owned
    else:
        queries, query_names, side, item_names = tasks[task].audio, owned[task], 1, named
    items = [
        (embedding, names)
        for j in members
        for embedding, names in zip(galleries[j][side], item_names[j], strict=True)
    ]
    values = []
    for query, wanted in zip(queries, query_names, strict=True):
        scored = sorted(
            ((-float(query @ embedding), bool(wanted & names)) for embedding, names in items)
        )
        hits = [position for position, (_, relevant) in enumerate(scored, start=1) if relevant]
        best = scored[hits[0] - 1][0]
        rank = 1 + sum(score <= best for score, relevant in scored if not relevant)
        precision = sum((i + 1) / hit for i, hit in enumerate(hits) if hit <= 10) / min(
            len(hits), 10
        )
        values.append(precision if metric == "mAP@10" else rank)
    if metric in ("mAP@10", "MedR"):
        return np.mean(values) if metric == "mAP@10" else np.median(values)
    return np.mean(np.array(values) <= int(metric[2:]))


@pytest.mark.parametrize("task_index", [0, 1, 2, 3])
def test_row_equals_loops_over_pools_and_indices(task_index):
    rng = np.random.default_rng(10 + task_index)
    tasks = [make_task(rng, clips) for clips in CLIPS]
    stale = make_stale(rng, tasks, task_index)
    row = retrieval.evaluate_row(tasks, stale, task_index)
    fresh = [(task.audio, task.text) for task in tasks]
    seen = range(task_index)
    for direction in retrieval.DIRECTIONS:
        for metric in retrieval.METRICS:
            for task in range(3):
                pools = {
                    "own/fresh": (fresh, [task]),
                    "all/fresh": (fresh, range(3)),
                    "seen/fresh": (fresh, seen) if task in seen else None,
                    "own/stale": (stale, [task]) if task in seen else None,
                    "seen/stale": (stale, seen) if task in seen else None,
                }
                for pool, case in pools.items():
                    value = row[f"{direction}/{metric}/{pool}"][task]
                    if case is None:
                        assert value is None, (metric, pool, task)
                    else:
                        expected = expected_value(direction, metric, tasks, case[0], task, case[1])
                        assert value == pytest.approx(expected, abs=1e-6), (
                            direction,
                            metric,
                            pool,
                            task,
                        )


def test_rows_have_the_same_keys_and_plain_values():
    tasks = [make_task(np.random.default_rng(j), clips) for j, clips in enumerate(CLIPS)]
    rows = [
        retrieval.evaluate_row(tasks, make_stale(np.random.default_rng(0), tasks, m), m)
        for m in (0, 3)
    ]
    assert rows[0].keys() == rows[1].keys() and len(rows[0]) == 2 * (5 * 5 + 1 + 3)
    assert all(
        type(value) in (float, type(None))
        for row in rows
        for values in row.values()
        for value in values
    )


def test_strict_relevance_knows_annotated_pairs_only():
    """Two clips with one caption text: either clip answers either caption, strictly only its own.

    Both captions score clip 0 highest, so caption 1 finds its own clip second.
    """
    task = retrieval.TaskEmbeddings(
        np.array([[1.0, 0.0], [0.6, 0.8]]),
        np.array([[1.0, 0.0], [1.0, 0.0]]),
        np.array([0, 1]),
        ("rain", "rain"),
    )
    row = retrieval.evaluate_row([task], [None], 0)
    assert row["text_to_audio/R@1/own/fresh"] == [1.0]
    assert row["text_to_audio/strict_R@1/own/fresh"] == [0.5]
    assert row["text_to_audio/strict_R@5/own/fresh"] == [1.0]
    # Clip-to-text: the captions tie, and a tie is a loss where only one of them counts.
    assert row["audio_to_text/R@1/own/fresh"] == [1.0]
    assert row["audio_to_text/strict_R@1/own/fresh"] == [0.0]


def test_joint_training_has_no_stale_galleries():
    tasks = [make_task(np.random.default_rng(j), clips) for j, clips in enumerate(CLIPS)]
    row = retrieval.evaluate_row(tasks, [None] * 3, 3)
    assert row["text_to_audio/R@1/own/stale"] == row["text_to_audio/R@1/seen/stale"] == [None] * 3
    assert row["text_to_audio/R@1/seen/fresh"] == row["text_to_audio/R@1/all/fresh"]


def test_stale_equals_fresh_where_the_model_has_not_moved():
    tasks = [make_task(np.random.default_rng(j), clips) for j, clips in enumerate(CLIPS)]
    row = retrieval.evaluate_row(tasks, [(task.audio, task.text) for task in tasks], 3)
    for key in row:
        if key.endswith("/stale"):
            assert row[key] == row[key.replace("/stale", "/fresh")]


def test_errors_name_the_task_and_the_array():
    tasks = [make_task(np.random.default_rng(j), clips) for j, clips in enumerate(CLIPS)]
    stale = make_stale(np.random.default_rng(0), tasks, 2)
    stale[1][1][3] = np.nan
    with pytest.raises(ValueError, match=r"task 2: stale text embeddings hold NaN or Inf in 1 of"):
        retrieval.evaluate_row(tasks, stale, 2)
    with pytest.raises(ValueError, match=r"task 1: stale audio embeddings have shape \(9, 3\)"):
        retrieval.evaluate_row(tasks, [(tasks[1].audio, tasks[0].text), None, None], 1)
    with pytest.raises(ValueError, match=r"task_index is 4; expected 0"):
        retrieval.evaluate_row(tasks, stale, 4)
