"""Predictions among seen classes, and accuracies by hand and by scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from tail_jax.evaluation import classification, continual

# Percent after sessions 1 to 3; by hand, equal test sets: A = 100, 85, 75; forgetting of session 1
# is 100 - 70, of session 2 is 90 - 60.
MATRIX = [[None] * 3, [1.0, None, None], [0.8, 0.9, None], [0.7, 0.6, 0.95]]


def test_hand_worked_matrix():
    assert classification.pooled_accuracy(MATRIX, [7, 7, 7]) == pytest.approx([1.0, 0.85, 0.75])
    pooled = classification.summarize_pooled(MATRIX, [7, 7, 7])
    assert pooled["average"] == pytest.approx(0.75)
    assert pooled["incremental_average"] == pytest.approx(0.86667, abs=1e-5)
    summary = continual.summarize({"accuracy/seen": MATRIX})["accuracy/seen"]
    assert summary["average"] == pytest.approx(0.75)
    assert summary["forgetting"] == pytest.approx(0.30)
    assert summary["backward_transfer"] == pytest.approx(-0.30)  # first-minus-last, its sign turned
    assert summary["forward_transfer"] is None


def test_pooled_accuracy_weighs_sessions_by_their_clips():
    sizes = [1, 4, 5]
    assert classification.pooled_accuracy(MATRIX, sizes)[1:] == pytest.approx(
        [(0.8 + 4 * 0.9) / 5, (0.7 + 4 * 0.6 + 5 * 0.95) / 10])


def test_joint_training_has_the_last_row_alone():
    matrix = [[None] * 2, [None] * 2, [0.5, 0.25]]
    assert classification.pooled_accuracy(matrix, [3, 1]) == [None, pytest.approx(0.4375)]
    assert classification.summarize_pooled(matrix, [3, 1]) == {
        "average": pytest.approx(0.4375), "incremental_average": None}


def test_pooled_accuracy_is_that_of_all_predictions_at_once():
    random = np.random.default_rng(0)
    labels = [random.integers(0, 2, 5), random.integers(2, 5, 9), random.integers(5, 7, 2)]
    seen = np.arange(7) < 7
    scores = [random.normal(size=(len(own), 7)) for own in labels]
    predicted = [classification.predict(own, seen) for own in scores]
    row = classification.accuracy_row([p == y for p, y in zip(predicted, labels)], 3)
    matrix = [[None] * 3] * 3 + [row]
    expected = accuracy_score(np.concatenate(labels), np.concatenate(predicted))
    assert classification.pooled_accuracy(matrix, [5, 9, 2])[-1] == pytest.approx(expected)


def test_a_class_not_seen_is_never_predicted_and_equal_scores_give_the_first():
    scores = np.array([[0.0, 9.0, 1.0, np.nan], [3.0, 9.0, 3.0, np.nan], [-2, 0, -1, np.inf]])
    seen = np.array([True, False, True, False])
    assert classification.predict(scores, seen).tolist() == [2, 0, 2]
    zeros = np.zeros((4, 4))  # logits of an untrained class are 0 and would win over negative ones
    assert classification.predict(zeros - [[1, 0, 1, 0]], seen).tolist() == [0] * 4


def test_what_cannot_be_judged_is_an_error():
    with pytest.raises(ValueError, match="NaN in 1 of 2 rows .first: row 1.*diverge"):
        classification.predict(np.array([[0.0, 1], [np.nan, 1]]), np.array([True, True]))
    with pytest.raises(ValueError, match="no class has been seen"):
        classification.predict(np.zeros((1, 2)), np.zeros(2, bool))
    with pytest.raises(ValueError, match="session 2 has no test clip"):
        classification.accuracy_row([np.ones(3, bool), np.ones(0, bool)], 4)
