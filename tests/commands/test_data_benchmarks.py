"""Suites of the data and of ranking: both sides compute the same, and memory is where it is said."""

import sys

import pytest

from tail_jax import benchmark
from tail_jax.benchmarks import OURS, Comparison, Options, frontend, table


def test_frontend_suite_compares_equal_features_with_every_peer():
    pytest.importorskip("transformers")
    report, shown = benchmark.benchmark("frontend", Options("tiny", repeats=2))
    assert len(shown.table.splitlines()) == 2 + 5
    peers = [next(who for who in case["measured"] if who != OURS) for case in report["cases"]]
    assert peers == [frontend.LIBROSA] * 3 + [frontend.TRANSFORMERS] * 2
    assert all(0 <= case["difference"] < 1e-3 for case in report["cases"])  # dB
    assert {"librosa", "transformers"} <= set(report["machine"]["versions"])


def test_frontend_suite_without_transformers_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    shown = frontend.run(Options("tiny", repeats=1))
    assert shown.note.endswith("; transformers is not installed")
    assert [case["case"].partition(", ")[2] for case in shown.cases] == [
        "one thread", "one thread", "all cores"]
    assert all(0 <= case["difference"] < 1e-3 for case in shown.cases)


def test_table_leaves_out_a_side_that_a_case_has_not():
    shown = table([Comparison("a", 1, {OURS: [1.0], "x": [2.0]}, 0.0),
                   Comparison("b", 1, {OURS: [1.0], "y": [4.0]}, 0.0, "MB")]).splitlines()
    assert shown[0] == "| case | tail_jax | x | y | ratio | difference |"
    assert shown[2:] == ["| a | 1 s (1 to 1) | 2 s (2 to 2) | – | 2.00 | 0.0e+00 |",
                         "| b | 1 MB (1 to 1) | – | 4 MB (4 to 4) | 4.00 | 0.0e+00 |"]
