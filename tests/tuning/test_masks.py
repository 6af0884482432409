"""Ordered rules over the leaves of a tree."""

import jax
import numpy as np
import pytest

from tail_jax.tuning.masks import apply_rules, count, leaf_name

TREE = {"a": {"w": np.zeros((2, 3)), "b": np.zeros(3)}, "c": [np.zeros(()), np.zeros(4)]}


def test_every_leaf_gets_the_value_of_its_rule():
    got = apply_rules(TREE, [(r"a/w", 1), (r"a/b|c/0", 2), (r"c/[1-9]", 3)])
    assert got == {"a": {"w": 1, "b": 2}, "c": [2, 3]}


def test_uncovered_leaves_raise_and_are_named():
    with pytest.raises(ValueError, match="rates: .*c/1: matched by no rule") as error:
        apply_rules(TREE, [(r"a/.*", 1), (r"c/0", 2)], "rates")
    assert "a/w" not in str(error.value) and "c/0" not in str(error.value)


def test_doubly_covered_leaves_raise_and_are_named_with_their_rules():
    with pytest.raises(ValueError, match=r"a/b: matched by \['a/b', '\.\*'\]") as error:
        apply_rules(TREE, [(r"a/b", 1), (r".*", 2)])
    assert "a/w" not in str(error.value)


def test_a_rule_must_match_the_whole_name():
    with pytest.raises(ValueError, match="a/w: matched by no rule"):
        apply_rules(TREE, [(r"a", 1), (r"w", 1), (r"a/b|c/.*", 1)])


def test_long_lists_of_problems_are_cut():
    with pytest.raises(ValueError, match="and 5 more"):
        apply_rules({str(i): np.zeros(1) for i in range(15)}, [])


def test_count_counts_values_and_leaves_out_the_excluded():
    assert count(TREE) == 6 + 3 + 1 + 4
    assert count(TREE, exclude=("b",)) == 6 + 1 + 4
    assert count(jax.eval_shape(lambda: TREE)) == 14  # shapes will do
    assert count({"b": {"x": np.zeros(5)}}, exclude=("b",)) == 5  # the last name alone decides


def test_leaf_names_are_paths():
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(TREE)]
    assert names == ["a/b", "a/w", "c/0", "c/1"]
