"""Summaries of one matrix worked by hand.

    A           task 1   task 2   task 3
    before       0.10     0.20     0.30
    after 1      0.60     0.25     0.30
    after 2      0.70     0.50     0.50
    after 3      0.40     0.55     0.80

average after last = (0.40 + 0.55 + 0.80) / 3
incremental average = (0.60 + (0.70 + 0.50) / 2 + 1.75 / 3) / 3
forgetting = ((0.70 - 0.40) + (0.50 - 0.55)) / 2 = 0.125
BWT = ((0.40 - 0.60) + (0.55 - 0.50)) / 2 = -0.075
FWT = ((0.25 - 0.20) + (0.50 - 0.30)) / 2 = 0.125
"""

import pytest

from tail_jax.evaluation import continual

MATRIX = [[0.10, 0.20, 0.30], [0.60, 0.25, 0.30], [0.70, 0.50, 0.50], [0.40, 0.55, 0.80]]
NOT_MEASURED = [None, None, None]


def test_summaries_equal_the_hand_worked_numbers():
    assert continual.average_after_last(MATRIX) == pytest.approx(1.75 / 3)
    assert continual.incremental_average(MATRIX) == pytest.approx((0.60 + 0.60 + 1.75 / 3) / 3)
    assert continual.forgetting(MATRIX) == pytest.approx(0.125)
    assert continual.backward_transfer(MATRIX) == pytest.approx(-0.075)
    assert continual.forward_transfer(MATRIX) == pytest.approx(0.125)
    assert continual.zero_shot(MATRIX) == [0.10, 0.20, 0.30]


def test_forgetting_is_negative_where_the_last_task_helped():
    """Task 1: max(0.5, 0.6) - 0.9 = -0.3; task 2: 0.4 - 0.5 = -0.1.

    A maximum that includes the last row would give 0.
    """
    matrix = [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.6, 0.4, 0.0], [0.9, 0.5, 0.7]]
    assert continual.forgetting(matrix) == pytest.approx(-0.2)


def test_forgetting_ignores_what_was_good_before_a_task_was_learned():
    """Task 2 had 0.9 before the first task; only rows from its own on count."""
    matrix = [[0.1, 0.9, 0.1], [0.5, 0.9, 0.1], [0.5, 0.4, 0.1], [0.5, 0.3, 0.7]]
    assert continual.forgetting(matrix) == pytest.approx((0.0 + 0.1) / 2)


def test_values_of_tasks_to_come_are_needed_for_forward_transfer_only():
    matrix = [NOT_MEASURED, [0.60, None, None], [0.70, 0.50, None], [0.40, 0.55, 0.80]]
    assert continual.forward_transfer(matrix) is None
    for summary in (
        continual.average_after_last,
        continual.incremental_average,
        continual.forgetting,
    ):
        assert summary(matrix) == summary(MATRIX)


def test_a_joint_run_has_an_average_only():
    matrix = [NOT_MEASURED, NOT_MEASURED, NOT_MEASURED, [0.4, 0.55, 0.8]]
    summary = continual.summarize({"text_to_audio/R@1/own/fresh": matrix})[
        "text_to_audio/R@1/own/fresh"
    ]
    assert summary.pop("average") == pytest.approx(1.75 / 3)
    assert set(summary.values()) == {None} and len(summary) == 4


def test_one_task_forgets_nothing():
    summary = continual.summarize({"accuracy/seen": [[0.2], [0.7]]})["accuracy/seen"]
    assert (summary["average"], summary["incremental_average"]) == (0.7, 0.7)
    assert (
        summary["forgetting"] is summary["backward_transfer"] is summary["forward_transfer"] is None
    )


def test_an_unfinished_run_has_no_average():
    assert continual.average_after_last(MATRIX[:3] + [NOT_MEASURED]) is None


def test_growing_pools_do_not_count_as_forgetting():
    keys = [f"text_to_audio/R@1/{pool}/fresh" for pool in ("own", "seen", "all")]
    summary = continual.summarize({key: MATRIX for key in keys})
    for key, forgets in zip(keys, (True, False, True)):
        assert (summary[key]["forgetting"] is not None) == forgets
        assert (summary[key]["backward_transfer"] is not None) == forgets
        assert summary[key]["average"] is not None


def test_ranks_are_averaged_and_nothing_else():
    summary = continual.summarize({"audio_to_text/MedR/own/fresh": MATRIX})[
        "audio_to_text/MedR/own/fresh"
    ]
    assert [name for name, value in summary.items() if value is not None] == ["average"]


def test_the_matrix_is_left_as_it_was():
    before = [list(row) for row in MATRIX]
    continual.summarize({"text_to_audio/R@1/own/fresh": MATRIX})
    assert MATRIX == before


@pytest.mark.parametrize(
    "matrix", [[], [[0.1]], [[0.1, 0.2], [0.1], [0.1, 0.2]], [[0.1, 0.2], [0.1, 0.2]]]
)
def test_a_matrix_of_the_wrong_shape_is_named(matrix):
    with pytest.raises(ValueError, match=r"expected M \+ 1 rows of M values"):
        continual.average_after_last(matrix)
